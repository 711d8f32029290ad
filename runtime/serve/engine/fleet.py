"""The engine as a front sees it: requests to ranks, tokens to texts, and both when a rank is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from moeless_opt.problems.arrays import SlotArray
from moeless_opt.problems.errors import MoelessError, ProblemError
from moeless_opt.problems.files import check_output
from moeless_opt.problems.plan import Plan
from moeless_opt.runtime.serve import (
    Deliver,
    Emitted,
    EngineBusyError,
    EngineStoppedError,
    PlanEvent,
    Planning,
    ServeEngine,
    ServeRequest,
    ServeStatus,
    TextCodec,
)
from moeless_opt.runtime.serve.engine.channel import Channel, ChannelClosedError
from moeless_opt.runtime.serve.engine.codec import TextStream
from moeless_opt.runtime.serve.engine.launch import (
    START,
    Crew,
    Hiring,
    launched_from_outside,
    prepare,
    serve_rank,
    start_crew,
)
from moeless_opt.runtime.serve.engine.models import ServedFacts, check_device, facts_of
from moeless_opt.runtime.serve.engine.options import EngineOptions
from moeless_opt.runtime.serve.engine.plans import given_plan, judged_plan
from moeless_opt.runtime.serve.engine.restarts import Restarts
from moeless_opt.runtime.serve.engine.state import ServeState, read_state, slots_for, write_state

__all__ = ["Fleet", "open_engine"]

log = logging.getLogger("moeless.serve")

#: Times that a request is begun anew.
RETRIES = 3
#: Events that are remembered.
EVENTS = 200
#: Seconds between two writings of the state.
SAVE = 1.0
#: What ranks count for themselves.
TOKENS = ("prompt_tokens", "cached_tokens", "generated_tokens")


def open_engine(options: EngineOptions) -> ServeEngine | None:
    """The engine for a front.

    Under torchrun only the first rank gets one; on the others this serves, until the first has ended, and
    returns None.
    """
    outside = launched_from_outside()
    if outside is not None and outside[0] > 0:
        serve_rank(options)
        return None
    return Fleet(options)


@dataclass(slots=True, eq=False)
class _Flight:
    """A request under way."""

    request: ServeRequest
    deliver: Deliver
    text: TextStream
    rank: int
    tokens: list[int] = field(default_factory=list)
    tries: int = 0
    cancelled: bool = False
    over: bool = False


class Fleet:
    """A `ServeEngine` of one or more ranks.

    Parameters
    ----------
    options : EngineOptions
        What to serve.

    Raises
    ------
    FormatError, ProblemError, UnsupportedFeatureError
        It cannot be served.
    """

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self.facts: ServedFacts = facts_of(options)
        self._check_options(options)
        self._crew: Crew | None = None
        self._flights: dict[str, _Flight] = {}
        self._held: Counter[str] = Counter()  # requests under way, by client
        self._load: list[int] = []
        self._alive: list[bool] = []
        #: Ranks that the others have in their midst, as far as was heard; those that are on their way to it.
        self._seated: set[int] = set()
        self._entering: set[int] = set()
        self._restarts = Restarts(options.max_restarts)
        self._returning: set[int] = set()
        self._over = threading.Event()
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._deciding = threading.RLock()
        self._ready: dict[int, dict[str, Any]] = {}
        self._reports: dict[int, dict[str, Any]] = {}
        self._group: dict[str, Any] = {}
        self._events: deque[PlanEvent] = deque(maxlen=EVENTS)
        self._told = self._own_events = 0
        #: Orders that not all ranks are known to have carried out, and answers, by their numbers.
        self._orders: deque[tuple[int, str, Any]] = deque()
        self._ordered = self._carried = 0
        self._answers: dict[int, PlanEvent] = {}
        #: Tokens that ranks computed which are gone.
        self._past: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._retried = 0
        self._ends: deque[float] = deque(maxlen=32)
        self._started = self._draining = self._closed = False
        self._failure = ""
        self._refusal: MoelessError | None = None
        self._warned = ""
        self._planning = options.planning
        self._saved: tuple[bytes, float] = (b"", 0.0)
        self._readers: list[threading.Thread] = []

    # -- what a front reads ------------------------------------------------------------------------

    @property
    def model(self) -> str:
        """Name for clients."""
        return self.facts.name

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together: the model's, or what the KV pool has room for."""
        most = self.facts.context_length
        return min(most, self._ready[0]["longest"]) if 0 in self._ready else most

    @property
    def codec(self) -> TextCodec:
        """Text to tokens and back."""
        return self.facts.codec

    # -- beginning and end -------------------------------------------------------------------------

    def start(self) -> None:
        """See `ServeEngine.start`."""
        if self._crew is not None:
            raise EngineStoppedError("the engine was started already")
        crew = self._crew = start_crew(self.options)
        ranks = len(crew.channels)
        self._load, self._alive = [0] * ranks, [True] * ranks
        for rank, channel in enumerate(crew.channels):
            self._listen(rank, channel)
        deadline = time.monotonic() + START
        with self._changed:
            while len(self._ready) < ranks and not self._failure and all(self._alive):
                if not self._changed.wait(max(deadline - time.monotonic(), 0.0)):
                    break
            began = len(self._ready) == ranks
        if not began:
            reason = self._failure or f"ranks did not begin within {START:g} s"
            self.close()
            raise self._refusal or MoelessError(reason)
        self._started = True
        self._restore()

    def _listen(self, rank: int, channel: Channel) -> None:
        reader = threading.Thread(
            target=self._read, args=(rank, channel), name=f"moeless-reader-{rank}", daemon=True
        )
        self._readers.append(reader)
        reader.start()

    def _check_options(self, options: EngineOptions) -> None:
        """What can be told before anything is loaded."""
        from moeless_opt.runtime.serve.engine.steering import check_planning

        outside, experts = launched_from_outside(), self.facts.experts
        ranks = options.ranks if outside is None else outside[1]
        if experts % ranks:
            fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
            raise ProblemError(
                "ranks", f"is {ranks}; {experts} experts can be spread over {fitting} ranks at the start"
            )
        check_planning(options.planning, experts, ranks)
        check_device(options)
        if options.state is not None:
            check_output(options.state)

    def _check(self, planning: Planning) -> None:
        from moeless_opt.runtime.serve.engine.steering import check_planning

        ranks = sum(self._alive) + len(self._returning)  # those that come back count
        largest = max(self._ready[0]["expert_bytes"]) if 0 in self._ready else 0
        check_planning(planning, self.facts.experts, max(ranks, 1), largest)

    def _restore(self) -> None:
        """Begin from the settings and the placement of the last run."""
        if self.options.state is None:
            return
        facts = self._ready[0]
        state = read_state(self.options.state, self.model, len(facts["layers"]), facts["experts"])
        if state is None:
            return
        try:
            if state.asked != self.options.planning:
                raise ProblemError("planning", "this start asks for others than the last one did")
            self._check(state.planning)
        except ProblemError as error:
            log.warning("the settings in %s are not used: %s", self.options.state, error)
        else:
            self._planning = state.planning
            if len(self._alive) > 1:
                prepare(state.planning)
            self._order("planning", state.planning)
        if len(self._alive) > 1:
            slots_LGC = slots_for(state, len(self._alive), self._planning.slots)
            self._order("apply", ("restored", slots_LGC))

    def drain(self, timeout: float | None = None) -> bool:
        """See `ServeEngine.drain`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._draining = True
            while self._flights:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self) -> None:
        """See `ServeEngine.close`."""
        with self._lock:
            if self._closed:
                return
            self._closed = self._draining = True
        self._over.set()
        self._end_all("the engine was closed")
        if self._crew is not None:
            self._save(force=True)
            self._order("stop", None)
            self._crew.close({rank for rank, alive in enumerate(self._alive) if alive})
            for reader in self._readers:
                if reader is not threading.current_thread():
                    reader.join(2.0)

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: ServeRequest, deliver: Deliver) -> None:
        """See `ServeEngine.submit`."""
        self._check_request(request)
        with self._lock:
            if self._failure or self._draining or not self._ready or not any(self._alive):
                raise EngineStoppedError(self._failure or "the engine takes no requests")
            if request.id in self._flights:
                raise ProblemError("id", f"{request.id!r} is in use")
            self.check_room(request.client)
            text = TextStream(self.codec, request.sampling.stop, request.prompt)
            flight = _Flight(request, deliver, text, self._least_busy())
            self._flights[request.id] = flight
            self._held[request.client] += 1
            self._send(flight)

    def check_room(self, client: str) -> None:
        """See `ServeEngine.check_room`.

        A quarter more than the queue has is kept for those who hold less than their even part of all places:
        one client's flood fills the queue and leaves a way in for others.
        """
        with self._lock:
            batch = self.options.max_running * sum(self._alive)
            room, held = batch + self.options.max_waiting, self._held[client]
            clients = len(self._held) + (not held)
            if held * clients < room:
                room += -(-self.options.max_waiting // 4)
            if not held:
                del self._held[client]  # looking made an entry
            if len(self._flights) >= room:
                raise EngineBusyError(max(len(self._flights) - batch, 0), self._patience())

    def _check_request(self, request: ServeRequest) -> None:
        prompt, most = request.prompt, self.context_length
        if not prompt:
            raise ProblemError("prompt", "is empty, must have at least one token")
        if len(prompt) >= most:
            raise ProblemError(
                "prompt", f"has {len(prompt)} tokens, the context has room for {most - 1} and an answer"
            )
        if not all(0 <= token < self.facts.vocabulary for token in prompt):
            raise ProblemError("prompt", f"has tokens outside 0..{self.facts.vocabulary - 1}")

    def _patience(self) -> float:
        """Seconds until a place is likely free: the mean time between two ends of late."""
        if len(self._ends) < 2:
            return 1.0
        return min(max((self._ends[-1] - self._ends[0]) / (len(self._ends) - 1), 1.0), 60.0)

    def _least_busy(self) -> int:
        return min((r for r, alive in enumerate(self._alive) if alive), key=lambda r: (self._load[r], r))

    def _send(self, flight: _Flight) -> None:
        assert self._crew is not None
        request = flight.request
        if flight.tokens:
            request = replace(request, prompt=(*request.prompt, *flight.tokens))
        self._load[flight.rank] += 1
        self._crew.channels[flight.rank].send(("submit", (request, len(flight.request.prompt))))

    def cancel(self, request: str) -> None:
        """See `ServeEngine.cancel`."""
        with self._lock:
            flight = self._flights.get(request)
            if flight is None or flight.cancelled:
                return
            flight.cancelled = True
            if self._crew is not None and self._alive[flight.rank]:
                self._crew.channels[flight.rank].send(("cancel", request))

    # -- what ranks say ----------------------------------------------------------------------------

    def _read(self, rank: int, channel: Channel) -> None:
        while True:
            try:
                messages = channel.take(0.5)
            except ChannelClosedError:
                self._gone(rank, channel)
                return
            for kind, content in messages:
                if kind == "tokens":
                    for said in content:
                        self._said(rank, *said)
                elif kind == "report":
                    self._reported(rank, content)
                elif kind == "ready":
                    self._begins(rank, content)
                elif kind == "failed":
                    self._failed(rank, content)

    def _begins(self, rank: int, facts: dict[str, Any]) -> None:
        """A rank serves from now on."""
        with self._changed:
            self._ready[rank] = facts
            self._restarts.serves(rank)
            if rank in self._entering:
                self._entering.discard(rank)
                self._returning.discard(rank)
                self._alive[rank] = True
            self._changed.notify_all()

    def _failed(self, rank: int, reason: str | MoelessError) -> None:
        """A rank says why it ends: before all have begun that is the end of the engine."""
        with self._changed:
            if len(self._ready) < len(self._alive):
                self._failure = self._failure or str(reason)
                if isinstance(reason, MoelessError):
                    self._refusal = self._refusal or reason
            else:
                log.error("rank %d ended: %s", rank, reason)
            self._changed.notify_all()

    def _said(self, rank: int, name: str, pick: Any, finish: Any, cached: int) -> None:
        with self._lock:
            flight = self._flights.get(name)
            if flight is None or flight.rank != rank or flight.over:
                return
            if pick is None:
                self._end(flight, Emitted(request=name, text=flight.text.flush(), finish=finish))
                return
            flight.tokens.append(pick.token)
            ends = finish == "stop"  # the token that ends a text is no part of it
            text = flight.text.flush() if ends else flight.text.push(pick.token, last=finish is not None)
            stopped = flight.text.stopped
            if stopped and finish is None and self._crew is not None:
                self._crew.channels[rank].send(("cancel", name))
            out = Emitted(
                request=name,
                token=pick.token,
                text=text,
                logprob=pick.logprob,
                top=pick.top,
                finish="stop" if stopped else finish,
                cached=cached,
            )
            if out.finish is not None:
                self._end(flight, out)
                return
        flight.deliver(out)

    def _end(self, flight: _Flight, last: Emitted) -> None:
        """Give a request its last word."""
        flight.over = True
        self._flights.pop(flight.request.id, None)
        self._load[flight.rank] -= 1
        client = flight.request.client
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
        self._finished[last.finish or "error"] += 1
        self._ends.append(time.monotonic())
        flight.deliver(last)
        self._changed.notify_all()

    def _end_all(self, reason: str) -> None:
        with self._lock:
            for flight in list(self._flights.values()):
                self._end(flight, Emitted(request=flight.request.id, finish="error", error=reason))

    def _gone(self, rank: int, channel: Channel) -> None:
        """A rank's process has ended."""
        with self._changed:
            if self._crew is None or self._crew.channels[rank] is not channel:
                return  # another one is in its place
            entering = rank in self._entering
            self._entering.discard(rank)
        if entering:
            self._return(rank)
        else:
            self._lost(rank)

    def _lost(self, rank: int) -> None:
        """A rank is gone: its requests go on elsewhere, from the tokens that they have."""
        with self._changed:
            if not self._alive[rank]:
                return
            self._alive[rank] = False
            self._seated.discard(rank)
            report = self._reports.pop(rank, {})
            self._past.update({name: report.get(name, 0) for name in TOKENS})
            self._changed.notify_all()
            if self._closed:
                return
            if not any(self._alive):
                self._failure = self._failure or "all ranks are gone"
                self._end_all(self._failure)
                return
            for flight in [f for f in self._flights.values() if f.rank == rank]:
                self._again(flight)
        if self._started:
            self._return(rank)

    def _again(self, flight: _Flight) -> None:
        """Begin a request anew whose rank was lost, or end it."""
        flight.tries += 1
        name, error = flight.request.id, f"{flight.tries} ranks were lost under it"
        if flight.cancelled:
            self._end(flight, Emitted(request=name, finish="cancelled"))
        elif flight.tries > RETRIES:
            self._end(flight, Emitted(request=name, finish="error", error=error))
        else:
            self._retried += 1
            self._load[flight.rank] -= 1
            flight.rank = self._least_busy()
            self._send(flight)

    # -- ranks that come back ----------------------------------------------------------------------

    def _return(self, rank: int) -> None:
        """Bring a rank back that was lost, beside everything else."""
        assert self._crew is not None
        if self._crew.hiring is None or self._closed or self._failure:
            return
        with self._lock:
            self._returning.add(rank)
        threading.Thread(
            target=self._bring_back, args=(rank, self._crew, self._crew.hiring), daemon=True
        ).start()

    def _bring_back(self, rank: int, crew: Crew, hiring: Hiring) -> None:
        while (wait := self._restarts.next(rank)) is not None:
            if self._over.wait(wait):
                return
            log.warning("rank %d is started anew", rank)
            try:
                hiring.start(rank, joins=True)
                (channel,) = hiring.arrived([rank])
            except MoelessError as error:
                log.warning("rank %d: %s", rank, error)
                continue
            with self._lock:
                crew.channels[rank], crew.processes[rank] = channel, hiring.processes[rank]
                self._entering.add(rank)
                channel.send(("enter", self._carried))
                for order in self._orders:
                    channel.send(("order", order))
            self._listen(rank, channel)
            return
        with self._lock:
            self._returning.discard(rank)
            many = f"was lost {self.options.max_restarts + 1} times in a row"
            text = f"rank {rank} {many if self.options.max_restarts else 'was lost'}: it is not started again"
            log.error("%s", text)
            self._own_events += 1
            self._events.append(
                PlanEvent(
                    number=self._told + self._own_events,
                    at=time.time(),
                    passes=self._group.get("passes", 0),
                    kind="ranks",
                    detail=text,
                )
            )

    def _reported(self, rank: int, report: dict[str, Any]) -> None:
        with self._changed:
            group = report.pop("group", None)
            if self._alive[rank]:
                self._reports[rank] = report
            if group is not None:
                self._heard(group)
            self._changed.notify_all()
        if group is None:
            return
        for gone in self._seated - set(group["members"]):
            self._evicted(gone)
        self._seated |= {member for member in group["members"] if self._alive[member]}
        self._save()

    def _heard(self, group: dict[str, Any]) -> None:
        """What the first of the ranks says of all of them; it may be another one than before."""
        for event in group.pop("events"):
            if event.number > self._told:
                self._told = event.number
                self._events.append(self._numbered(event))
        for number, event in group.pop("answers"):
            if number > self._carried:
                self._answers[number] = self._numbered(event)
        self._carried = max(self._carried, group["carried_out"])
        while self._orders and self._orders[0][0] <= self._carried:
            self._orders.popleft()
        self._group = group

    def _numbered(self, event: PlanEvent) -> PlanEvent:
        """Counted together with what is told here."""
        return replace(event, number=event.number + self._own_events)

    def _evicted(self, rank: int) -> None:
        """The others went on without a rank that did not answer."""
        assert self._crew is not None
        self._seated.discard(rank)
        if rank < len(self._crew.processes):
            self._crew.processes[rank].kill()
        self._lost(rank)

    def _save(self, *, force: bool = False) -> None:
        with self._lock:
            group = self._group
            if self.options.state is None or not group or group["asleep"]:
                return
            slots_LGC: SlotArray = group["target_LGC"]
            print_of = slots_LGC.tobytes() + repr(group["planning"]).encode()
            at = self._saved[1]
            if self._saved[0] == print_of or (not force and time.monotonic() - at < SAVE):
                return
            self._saved = (print_of, time.monotonic())
            state = ServeState(
                model=self.model,
                experts=self._ready[0]["experts"],
                slots_LGC=slots_LGC,
                load_LE=group["load_LE"],
                planning=group["planning"],
                asked=self.options.planning,
            )
        try:
            write_state(self.options.state, state)
        except (MoelessError, OSError) as error:  # nobody's request shall suffer from it
            if self._warned != str(error):
                self._warned = str(error)
                log.warning("the state is not kept: %s", error)

    # -- steering ----------------------------------------------------------------------------------

    def _order(self, kind: str, content: Any) -> int:
        """Tell all ranks; with the lock, so that all get their orders in one order. Returns its number."""
        with self._lock:
            assert self._crew is not None
            self._ordered += 1
            self._orders.append((self._ordered, kind, content))
            for rank, channel in enumerate(self._crew.channels):
                if self._alive[rank] or rank in self._entering:
                    channel.send(("order", self._orders[-1]))
            return self._ordered

    def status(self) -> ServeStatus:
        """See `ServeEngine.status`."""
        with self._lock:
            reports, group, facts = list(self._reports.values()), self._group, self._ready.get(0, {})
            alive = sum(self._alive)
            layers = tuple(facts.get("layers", ()))
            experts = facts.get("experts", 0)
            none = np.zeros((len(layers), experts), dtype=np.int64)
            running = sum(r["running"] for r in reports)
            tokens = Counter(self._past)
            for report in reports:
                tokens.update({name: report[name] for name in TOKENS})
            return ServeStatus(
                ready=bool(self._ready) and not (self._failure or self._draining) and alive > 0,
                ranks=alive,
                running=running,
                waiting=max(len(self._flights) - running, 0),
                capacity=self.options.max_waiting,
                kv_blocks=sum(self._ready[r]["kv_blocks"] for r in self._ready if self._alive[r]),
                kv_blocks_used=sum(r["used"] for r in reports),
                kv_cached_blocks=sum(r["kept"] for r in reports),
                passes=group.get("passes", 0),
                prompt_tokens=tokens["prompt_tokens"],
                cached_tokens=tokens["cached_tokens"],
                generated_tokens=tokens["generated_tokens"],
                finished=dict(self._finished),
                retried=self._retried,
                layers=layers,
                load_LE=group.get("load_LE", none),
                tokens_LG=group.get("tokens_LG", np.zeros((len(layers), alive), dtype=np.int64)),
                replicas_LE=group.get("replicas_LE", none),
                imbalance_L=group.get("imbalance_L", np.ones(len(layers))),
                largest_rows=group.get("largest_rows", 0.0),
                mean_rows=group.get("mean_rows", 0.0),
                plans=group.get("plans", 0),
                bytes_moved=group.get("bytes_moved", 0),
                plan_seconds=group.get("plan_seconds", 0.0),
                wait_seconds=group.get("wait_seconds", 0.0),
                cold_starts=group.get("cold_starts", 0),
                cost=group.get("cost", {}),
                prediction_error=group.get("prediction_error"),
                recoveries=group.get("recoveries", 0),
                restarts=self._restarts.count,
                events=tuple(self._events),
            )

    def plan(self) -> Plan:
        """See `ServeEngine.plan`."""
        with self._lock:
            group, facts = self._group, self._ready.get(0)
        if not group or facts is None:
            raise EngineStoppedError("nothing is served yet")
        return judged_plan(group["target_LGC"], group["load_LE"], facts)

    def apply(self, plan: Plan | Mapping[str, Any]) -> PlanEvent:
        """See `ServeEngine.apply`."""
        with self._lock:
            group, facts = self._group, self._ready.get(0)
            if not group or facts is None or self._closed:
                raise EngineStoppedError("nothing is served")
        found = given_plan(plan, group["target_LGC"], group["load_LE"], facts)
        return self._ask("apply", ("given", found))

    def planning(self) -> Planning:
        """See `ServeEngine.planning`."""
        with self._lock:
            planning: Planning = self._group.get("planning", self._planning)
            return planning

    def set_planning(self, **changes: Any) -> Planning:
        """See `ServeEngine.set_planning`."""
        known = {entry.name for entry in fields(Planning)}
        for name in changes:
            if name not in known:
                raise ProblemError(name, f"is no setting; there are {', '.join(sorted(known))}")
        wanted = self._wanted(changes)
        if sum(self._alive) > 1:
            prepare(wanted)  # nobody waits for this who asks for something else
        with self._deciding:  # who changes one setting undoes nobody's change of another
            wanted = self._wanted(changes)
            self._ask("planning", wanted)
        return wanted

    def _wanted(self, changes: dict[str, Any]) -> Planning:
        """The settings that are asked for last with some changed, if that can be."""
        with self._lock:
            if not self._ready or self._closed:
                raise EngineStoppedError("nothing is served")
            under_way = [content for _, kind, content in self._orders if kind == "planning"]
            wanted: Planning = replace(under_way[-1] if under_way else self.planning(), **changes)
            self._check(wanted)
            return wanted

    def _ask(self, kind: str, content: Any, timeout: float = 30.0) -> PlanEvent:
        """Give an order and wait until it is carried out."""
        with self._deciding, self._changed:
            number, deadline = self._order(kind, content), time.monotonic() + timeout
            while number not in self._answers:
                if self._closed or self._failure:
                    raise EngineStoppedError(self._failure or "the engine was closed")
                if not self._changed.wait(deadline - time.monotonic()):
                    raise EngineStoppedError(
                        f"the ranks have not answered within {timeout:g} s; they do it once they can"
                    )
            event = self._answers.pop(number)
            self._answers.clear()  # of those that nobody waits for any more
        if event.kind == "refused":
            raise ProblemError("plan", f"was refused: {event.detail}")
        return event
