"""Experts that are brought before rows ask for them: as much as the bus has time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from mixtralkit.moe.tiers.bus import PIECE, Ticket
from mixtralkit.moe.tiers.cache import Key
from mixtralkit.moe.tiers.memory import Move, in_pieces

MOST_IN_VAIN = 0.1  # of missed bytes, those that may be brought for guesses and not be wanted
AT_FIRST = 0.5  # share of guesses that are taken to come true before any has
MEMORY = 0.02  # of the share, what one guess more counts


@dataclass
class _Arrival:
    """An expert on its way to its place: copies to begin, and the last one that was begun."""

    moves: list[Move]
    ticket: Ticket | None = None
    guessed_bytes: int = 0  # of all of it, where it is a guess
    stays: bool = False  # whoever asks for it next


class Arrivals:
    """What is on its way.

    A guess has the bus only while nothing that rows wait for is on it, and none is made that could bring all bytes that
    were guessed in vain above ``MOST_IN_VAIN`` of those that were missed.

    Attributes:
        right: share of guesses that come true, the last ones counting most.
        missed_bytes: of experts that rows asked for and that were not there before anybody brought them.
    """

    def __init__(self, copy: Callable[[list[Move], bool], Ticket]) -> None:
        """``copy`` begins copies, in front of all others or behind them."""
        self._copy, self.right = copy, AT_FIRST
        self._of: dict[Key, _Arrival] = {}
        self._came: dict[Key, _Arrival] = {}  # before rows of their layer have asked
        self._demand: Ticket | None = None
        self.missed_bytes = self._vain = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._of

    def __iter__(self) -> Iterator[Key]:
        return iter(tuple(self._of))

    @property
    def staying(self) -> int:
        """How many experts are being completed."""
        return sum(arrival.stays for arrival in self._of.values())

    def in_vain(self, layer: int, needed: Collection[Key]) -> list[Key]:
        """Of a layer, what was brought for rows that now ask for others."""
        return [key for key, one in self._of.items() if key[0] == layer and key not in needed and not one.stays]

    def demand(self, ticket: Ticket) -> None:
        """Rows wait for copies on the bus; these end in order."""
        self._demand = ticket

    def asked(self, layer: int, needed: Collection[Key]) -> list[Key]:
        """Rows ask for a layer's experts: those that came for them in time."""
        came = {key: self._came.pop(key) for key in [key for key in self._came if key[0] == layer]}
        for key, arrival in came.items():
            self._judge(arrival, key in needed)
        return [key for key in came if key in needed]

    def begin(self, key: Key, moves: list[Move]) -> None:
        """Brings an expert that is sure to be wanted."""
        arrival = self._of[key] = _Arrival(moves)
        arrival.ticket, arrival.moves = self._copy(moves, True), []

    def may_guess(self, nbytes: int) -> bool:
        """Whether the bus has time for a guess of so many bytes."""
        at_stake = self._vain + nbytes + sum(arrival.guessed_bytes for arrival in self._of.values())
        return at_stake <= MOST_IN_VAIN * self.missed_bytes and self._is_idle()

    def guess(self, key: Key, moves: list[Move]) -> None:
        """Brings an expert in pieces, as ``pump`` finds the bus idle."""
        self._of[key] = _Arrival(moves, guessed_bytes=sum(move.nbytes for move in moves))

    def complete(self, key: Key, moves: list[Move]) -> None:
        """Brings, as ``guess`` does, what is missing of an expert that stays."""
        self._of[key] = _Arrival(moves, stays=True)

    def _is_idle(self) -> bool:
        """Whether nothing that rows wait for is on the bus."""
        if self._demand is not None and self._demand.query():
            self._demand = None
        return self._demand is None

    def done(self, layer: int | None = None) -> list[tuple[Key, Ticket]]:
        """Experts that have come, of a layer or to stay; they are on their way no more."""
        own = [(key, one) for key, one in self._of.items() if (one.stays or key[0] == layer) and not one.moves]
        found = {key: self._of.pop(key) for key, one in own if one.ticket.query()}
        self._came |= {key: one for key, one in found.items() if not one.stays}
        return [(key, one.ticket) for key, one in found.items()]

    def pump(self) -> None:
        """Begins the next piece of what is guessed, once the last one is there."""
        if not self._of or not self._is_idle():
            return
        for arrival in self._of.values():
            if arrival.ticket is not None and not arrival.ticket.query():
                return
            while arrival.moves:
                arrival.moves[:1] = in_pieces(arrival.moves[:1], PIECE)
                arrival.ticket = self._copy([arrival.moves.pop(0)], False)
                if not arrival.ticket.query():
                    return

    def finish(self, key: Key) -> list[Ticket]:
        """Rows ask for it: begins what is left."""
        arrival = self._of.pop(key)
        self._judge(arrival, True)
        tickets = [] if arrival.ticket is None else [arrival.ticket]
        if arrival.moves:
            tickets.append(self._copy(arrival.moves, True))
        return tickets

    def give_up(self, key: Key) -> Ticket | None:
        """Nobody wants it: its ticket where all of it was begun, else None, and nothing is written any more."""
        arrival = self._of.pop(key)
        self._judge(arrival, False)
        if not arrival.moves and arrival.ticket is not None:
            return arrival.ticket
        while arrival.ticket is not None and not arrival.ticket.query():
            time.sleep(0)
        return None

    def _judge(self, arrival: _Arrival, is_right: bool) -> None:
        if arrival.guessed_bytes:
            self.right += MEMORY * (is_right - self.right)
            self._vain += 0 if is_right else arrival.guessed_bytes - sum(move.nbytes for move in arrival.moves)
