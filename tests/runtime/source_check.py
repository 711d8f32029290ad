"""What every rank's own tokens choose, recorded while the model runs, and read again; used by workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import moeless_opt as mo
from moeless_opt.problems.errors import ProblemError
from moeless_opt.runtime.engines.observe import record_sources, record_traces
from moeless_opt.runtime.live import LiveModel


def check(live: LiveModel, run: Callable[[], Any], valid: Any, load_LE: Any) -> None:
    """Run passes under record.

    valid : which tokens of a pass count, where not all do.
    load_LE : what all ranks' tokens choose in a pass.
    """
    rank, size = live.group.rank, live.group.size
    folder = f"{os.environ['WORLD_FOLDER']}/sources"
    with record_traces(live) as tracer, record_sources(live) as recorder:
        assert not recorder.load_LE.any()
        run()
    own_LE = tracer.trace().load_LE()
    run()  # is not recorded
    assert (recorder.load_LE == own_LE).all()
    recorder.save(folder)
    dist.barrier()
    loads = mo.read_sources(folder)
    assert loads.layers == tuple(live.layers)
    assert loads.load_TLGE is not None
    assert loads.load_TLGE.shape[2] == size
    assert (loads.load_TLGE[0, :, rank] == own_LE).all()
    assert (loads.load_LE == load_LE).all()
    together = recorder.loads()
    assert together.load_TLGE is not None
    assert (together.load_TLGE == loads.load_TLGE).all()
    recorder.clear()
    with pytest.raises(ProblemError, match="no token was recorded"):
        recorder.loads()
    dist.barrier()
    # Rank 0 idles: its file has no load, and is read.
    with live.real_tokens(valid & (rank > 0)), record_sources(live) as recorder:
        run()
    recorder.save(folder)
    dist.barrier()
    part = mo.read_sources(folder).load_TLGE
    assert part is not None
    assert not part[0, :, 0].any()
    topk = load_LE.sum() / (size * len(live.layers) * valid.numel())
    assert part[0, :, 1:].sum() == len(live.layers) * topk * valid.sum().item() * (size - 1)
    dist.barrier()
    # A file of a rank that is none of these is of another run.
    if rank == 0:
        Path(folder, f"loads_rank{size}.csv").write_text("{}", encoding="utf-8")
    dist.barrier()
    with pytest.raises(ProblemError, match=f"has loads_rank{size}.csv, there are {size} ranks"):
        recorder.save(folder)
