"""How problems are solved: one file per idea."""
