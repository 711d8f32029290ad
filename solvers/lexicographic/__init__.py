"""Any order of priorities, exact for small layers. May import every room of the solvers but `auto`."""
