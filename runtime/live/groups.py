"""The ranks that hold one set of experts, and two process groups among them: for tokens and for weights.

Weights travel on a group of their own, so that a transfer never queues before a batch's all-to-all. Both
groups are ours alone, made from a store and nothing else: they stand in no registry of torch's, their names
never repeat, and they can be made and given up at any moment by just the ranks that belong to them. That is
what lets the survivors of a failure go on while the default group is broken.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import socket
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moeless_opt.problems.arrays import FloatArray
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.runtime.live import nccl
from moeless_opt.runtime.live.heartbeat import Heartbeat

__all__ = ["ExpertGroup", "RankLostError", "SideGroup"]


class RankLostError(MoelessError):
    """An operation among the ranks failed: one of them died, or did not answer in time."""


@contextlib.contextmanager
def _losses() -> Iterator[None]:
    """Turn what gloo and NCCL raise into one error."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # A RuntimeError, too, but this rank's own trouble, which comes again however often it is tried.
        raise MemoryError(str(error)) from error
    except RuntimeError as error:
        raise RankLostError(str(error)) from error


#: Seconds in which ranks that have just met must have connected: who has not died on the way is there. Where
#: hearts are listened to more closely, this times what one may be silent, and at least the second number.
MEET = 20.0
QUICK_MEET = (1.5, 4.0)
#: The longest wait for a work before this rank looks whether somebody is lost.
SLICE = datetime.timedelta(seconds=0.25)

#: How often this process has made groups of the same ranks: their members count alike.
_made: dict[tuple[int, ...], int] = {}


def _make_group(
    store: Any, prefix: str, rank: int, size: int, device: torch.device, timeout: float, meet: float | None
) -> Any:
    """A process group that torch's registry does not know."""
    own = dist.distributed_c10d.PrefixStore(prefix, store)
    group = dist.ProcessGroup(own, rank, size)
    if device.type == "cuda":
        backend = nccl.make(own, rank, size, timeout)
        kind = dist.ProcessGroup.BackendType.NCCL
    else:
        first = datetime.timedelta(seconds=timeout if meet is None else min(timeout, meet))
        backend = dist.ProcessGroupGloo(own, rank, size, timeout=first)
        backend._set_default_timeout(datetime.timedelta(seconds=timeout))
        kind = dist.ProcessGroup.BackendType.GLOO
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(device, kind, backend)
    return group


def _wait(work: Any, heart: Heartbeat | None) -> None:
    """Wait for a collective on gloo as long as nobody is lost."""
    if heart is None:
        work.wait()
        return
    while True:
        try:
            work.wait(SLICE)
            return
        except RuntimeError:
            if work.is_completed():
                work.wait()  # it failed by itself, or came to an end at this very moment
                return
        if heart.news:
            raise RankLostError(heart.news)


def _leak(group: Any) -> None:
    """Never free a group in which an operation hangs: freeing waits for the operation."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class ExpertGroup:
    """The ranks that hold one complete set of experts between them.

    Parameters
    ----------
    ranks : sequence of int
        Global ranks, ascending; their order is the rank axis of every placement.
    rank : int
        This process's index among them.
    device : torch.device
        Where tokens and weights live: NCCL for CUDA, gloo for CPU.
    timeout : float
        Seconds after which an operation on these groups gives up.
    store : torch.distributed.Store or None
        Where the ranks find each other; not needed for one rank.
    node_R : sequence of int, optional
        Node of each rank; by host name when absent.
    name : str
        Distinguishes groups of the same ranks; the same on all of them.
    staged : bool
        Carry everything through host memory by gloo: for several ranks on one GPU, which NCCL refuses.
    heart : Heartbeat, optional
        Tells of losses; without it they show as closed connections and timeouts only.
    meet : float, optional
        Seconds for the others to connect, if not the timeout; 0: this rank stands outside, see `create`.
    """

    #: Whether a group of one rank makes its calls all the same.
    talks_to_itself = False

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        timeout: float,
        store: Any = None,
        node_R: Sequence[int] | None = None,
        name: str = "",
        staged: bool = False,
        heart: Heartbeat | None = None,
        meet: float | None = None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.rank = rank
        self.size = len(self.ranks)
        self.device = device
        #: Where what travels has to lie.
        self.carrier = torch.device("cpu") if staged else device
        self.staged = staged
        self.timeout = timeout
        self.store = store
        self.node_R: tuple[int, ...] = (0,) * self.size
        self._tokens: Any = None
        self._weights: Any = None
        self._sides = 0
        self.name = name
        self.alone = self.size == 1 and not self.talks_to_itself
        self.heart = heart
        self.outside = meet == 0
        self._hung: list[Any] = []
        #: Nodes as they were given, by global rank.
        self.given_nodes = None if node_R is None else dict(zip(self.ranks, node_R, strict=False))
        if not self.alone and not self.outside:
            if heart is not None:
                heart.on_loss = self._abort
            name = f"moeless/{'-'.join(map(str, self.ranks))}/{name}"
            with _losses():
                self._tokens, self._weights = (
                    _make_group(store, f"{name}/{what}", rank, self.size, self.carrier, timeout, meet)
                    for what in ("tokens", "weights")
                )
            # NCCL wants every rank in a communicator's first call, so that point-to-point may follow.
            hosts = [row[0] for row in self.gather_ints([zlib.crc32(socket.gethostname().encode())])]
            self.gather_ints([0], weights=True)
            names = list(dict.fromkeys(hosts))
            self.node_R = tuple(names.index(host) for host in hosts)
        if node_R is not None:
            if len(node_R) != self.size:
                raise ProblemError("node_G", f"has {len(node_R)} entries for {self.size} ranks")
            self.node_R = tuple(int(n) for n in node_R)

    @classmethod
    def create(
        cls,
        ranks: Sequence[int] | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout: float = 600.0,
        node_R: Sequence[int] | None = None,
        store: Any = None,
        staged: bool = False,
        dead_after: float | None = None,
        join: int | None = None,
    ) -> ExpertGroup:
        """Build both groups among `ranks` (all of the world by default); just these ranks call it, together.

        Parameters
        ----------
        ranks : sequence of int, optional
            Global ranks.
        device, timeout, node_R, store, staged
            As of the class; the store of the default process group by default.
        dead_after : float, optional
            Seconds without a sign of life after which a rank counts as lost; None: no signs of life.
        join : int, optional
            The group runs already and has lost this (global) rank, which stands outside until a `Guard`
            brings it in. Needs `ranks`, as they were at first, and `store`.
        """
        device = torch.device(device)
        if join is not None:
            if ranks is None or store is None or join not in ranks:
                raise ProblemError("join", f"is {join}: needs a store, and the group's first ranks with it")
            members = tuple(sorted(ranks))
            return cls(members, members.index(join), device, timeout, store, node_R, staged=staged, meet=0)
        if not dist.is_available() or not dist.is_initialized():
            if ranks is not None and len(ranks) > 1:
                raise ProblemError("ranks", "more than one rank needs torch.distributed to be initialised")
            return cls((0,), 0, device, timeout)
        me = dist.get_rank()
        members = tuple(sorted(range(dist.get_world_size()) if ranks is None else ranks))
        if me not in members:
            raise ProblemError(
                "ranks", f"rank {me} builds a group {list(members)} to which it does not belong"
            )
        if store is None:
            store = dist.distributed_c10d._get_default_store()
            # Without the prefix that torch adds: who comes back has the store that the world was given.
            store = getattr(store, "underlying_store", store)
        _made[members] = _made.get(members, 0) + 1
        name = f"{_made[members]}"
        heart = None
        if dead_after is not None and len(members) > 1:
            heart = Heartbeat(store, f"moeless/{'-'.join(map(str, members))}/{name}", me, dead_after)
        group = cls(members, members.index(me), device, timeout, store, node_R, name, staged, heart)
        if heart is not None:
            heart.follow(dict.fromkeys(members, 0))
        return group

    def among(self, ranks: Sequence[int], name: str, heart: Heartbeat | None) -> ExpertGroup:
        """New groups among these (global) ranks, which all call this: some of those here, or more."""
        nodes = self.given_nodes
        meet = MEET if heart is None else min(MEET, max(heart.dead_after * QUICK_MEET[0], QUICK_MEET[1]))
        made = ExpertGroup(
            ranks,
            list(ranks).index(self.ranks[self.rank]),
            self.device,
            self.timeout,
            self.store,
            None if nodes is None else [nodes[rank] for rank in ranks],
            name,
            self.staged,
            heart,
            meet,
        )
        made.given_nodes = nodes  # of those, too, that are away
        return made

    def side(self) -> SideGroup:
        """One more group of the same ranks, for a thread of its own; all of them call this together."""
        self._sides += 1
        return SideGroup(self, self._sides)

    # -- operations --------------------------------------------------------------------------------

    def _group(self, weights: bool = False) -> Any:
        group = self._weights if weights else self._tokens
        if group is None:
            raise RankLostError("this rank is outside the group" if self.outside else "the group was closed")
        return group

    def check(self) -> None:
        """Look for a loss: on a GPU no operation raises, and what was waited for may never have come.

        Raises
        ------
        RankLostError
        """
        if self.heart is not None and self.heart.news:
            raise RankLostError(self.heart.news)

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, once it is there, unless a rank was lost meanwhile.

        Raises
        ------
        RankLostError
        """
        if not tensor.is_cuda:
            return tensor
        with self.host_wait():
            return tensor.cpu()

    @contextlib.contextmanager
    def host_wait(self) -> Iterator[None]:
        """The host waits inside for what the ranks have to do on their devices.

        Raises
        ------
        RankLostError
            If a rank was lost meanwhile: what was waited for may be anything.
        """
        with _losses(), contextlib.nullcontext() if self.heart is None else self.heart.waiting(self.timeout):
            yield
        self.check()

    def _finish(self, work: Any, group: Any) -> None:
        """Wait for a collective; on CUDA that orders the stream behind it, and the host goes on."""
        if self.carrier.type == "cuda":
            self.check()
            work.wait()
            return
        try:
            _wait(work, self.heart)
        except RankLostError:
            self._hung.append(group)
            raise

    def all_gather(self, mine: Tensor, *, weights: bool = False) -> Tensor:
        """Everybody's tensor, one row per rank."""
        if self.alone:
            return mine[None]
        # Flat output: gloo refuses the stacked form.
        out = torch.empty(self.size * mine.numel(), dtype=mine.dtype, device=self.carrier)
        with _losses():
            group = self._group(weights)
            self._finish(group._allgather_base(out, mine.to(self.carrier).contiguous()), group)
        return out.view(self.size, -1).to(mine.device)

    def gather_ints(self, values: Sequence[int], *, weights: bool = False) -> list[list[int]]:
        """Everybody's numbers (equally many), in order of rank."""
        mine = torch.tensor(list(values), dtype=torch.int64, device=self.carrier)
        rows: list[list[int]] = self.to_host(self.all_gather(mine, weights=weights)).tolist()
        return rows

    def all_to_all(self, rows: Tensor, receive: list[int], give: list[int]) -> Tensor:
        """Rows to their ranks: ``give[r]`` of them in order to rank r, ``receive[r]`` from it."""
        if self.alone:
            return rows
        out = rows.new_empty((sum(receive), *rows.shape[1:]), device=self.carrier)
        with _losses():
            group = self._group()
            work = group.alltoall_base(out, rows.to(self.carrier).contiguous(), receive, give)
            self._finish(work, group)
        return out.to(rows.device)

    def exchange(
        self, sends: Sequence[tuple[Tensor, int, int]], receives: Sequence[tuple[Tensor, int, int]]
    ) -> list[Any]:
        """Start sending and receiving weights as one batch.

        Parameters
        ----------
        sends, receives : sequences of (tensor, rank of the group, tag)
            Between two ranks in the same order on both. gloo goes by the tags, NCCL by the order.

        Returns
        -------
        list of works
            To be waited for. On CUDA waiting orders the current stream, and not the host, behind them. Where
            they are staged, they begin only then.
        """
        if not sends and not receives:
            return []
        if self.staged:
            return [_Staged(self._group(weights=True), sends, receives)]
        with _losses():
            group = self._group(weights=True)
            if self.device.type != "cuda":
                return _post(group, sends, receives)
            with nccl.batch(group, self.device) as works:
                _post(group, sends, receives)
            return works

    def wait(self, works: Sequence[Any]) -> None:
        """Wait for what `exchange` started."""
        with _losses():
            for work in works:
                work.wait()

    def close(self, reason: str = "") -> None:
        """Give both groups up, and let the others hear that this rank has left, and why."""
        if self.heart is not None:
            self.heart.stop(reason)
        self.give_up()

    def give_up(self) -> None:
        """Give both groups up, without waiting for anybody; the signs of life go on.

        Ranks that still wait in a collective with this one get an error at once: that is how the news of a
        death spreads faster than any timeout.
        """
        self._abort()
        for group in self._hung:
            _leak(group)
        self._hung = []
        # With the last reference gloo closes its connections.
        self._tokens = self._weights = None

    def _abort(self) -> None:
        """Wake whoever waits in an operation of these groups; from any thread."""
        if self.carrier.type == "cuda":
            for group in (self._tokens, self._weights):
                if group is not None:
                    nccl.abort(group)


def _post(
    group: Any, sends: Sequence[tuple[Tensor, int, int]], receives: Sequence[tuple[Tensor, int, int]]
) -> list[Any]:
    works = [group.send([t], peer, tag) for t, peer, tag in sends]
    return works + [group.recv([t], peer, tag) for t, peer, tag in receives]


class _Staged:
    """Sends and receives of tensors on a device, through host memory; they begin in `wait`."""

    def __init__(self, group: Any, sends: Sequence[Any], receives: Sequence[Any]) -> None:
        self.group, self.sends, self.receives = group, sends, receives

    def wait(self) -> None:
        """Carry all of it; what arrives is copied on the current stream."""
        pinned = torch.cuda.is_available()
        incoming = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t, _, _ in self.receives]
        outgoing = [t.detach().cpu() for t, _, _ in self.sends]
        works = [self.group.send([t], p, tag) for t, (_, p, tag) in zip(outgoing, self.sends, strict=True)]
        works += [
            self.group.recv([t], p, tag) for t, (_, p, tag) in zip(incoming, self.receives, strict=True)
        ]
        for work in works:
            work.wait()
        for (tensor, _, _), arrived in zip(self.receives, incoming, strict=True):
            tensor.copy_(arrived, non_blocking=True)
        if pinned:
            torch.cuda.current_stream().synchronize()
        self.group = None


class SideGroup:
    """Numbers among the ranks of an `ExpertGroup`, beside its traffic, on the host, by its own connections.

    A thread may wait here while the ranks' forward passes go on, as long as every rank's thread comes.

    Parameters
    ----------
    group : ExpertGroup
        The ranks.
    number : int
        Counts the side groups of `group`; the same on all of them.
    """

    def __init__(self, group: ExpertGroup, number: int) -> None:
        self.size = group.size
        self._heart = group.heart
        self._group: Any = None
        if self.size > 1:
            name = f"moeless/{'-'.join(map(str, group.ranks))}/{group.name}/side{number}"
            with _losses():
                self._group = _make_group(
                    group.store, name, group.rank, self.size, torch.device("cpu"), group.timeout, None
                )

    def sum(self, mine: FloatArray) -> FloatArray:
        """Sum over the ranks, added in their order: the same bits on all of them."""
        if self.size == 1:
            return mine.copy()
        group = self._group
        if group is None:
            raise RankLostError("the group was closed")
        row = torch.from_numpy(np.ascontiguousarray(mine, dtype=np.float64)).reshape(-1)
        out = torch.empty(self.size * row.numel(), dtype=torch.float64)
        with _losses():
            try:
                _wait(group._allgather_base(out, row), self._heart)
            except RankLostError:
                _leak(group)
                raise
        total = np.zeros(row.numel())
        for part in out.view(self.size, -1).numpy():
            total += part
        return total.reshape(mine.shape)

    def close(self) -> None:
        """Give it up; whoever waits in it gets an error."""
        self._group = None
