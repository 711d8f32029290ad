"""A process of one rank: ``python -m moeless_opt.runtime.serve.engine.rank``, started by `launch`."""

import warnings

from moeless_opt.runtime.serve.engine.launch import rank_main

__all__: list[str] = []

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank_main()
