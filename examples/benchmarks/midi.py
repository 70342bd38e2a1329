"""Standard MIDI files to notes, notes to the events of Oore et al. (2018), and MAESTRO in blocks of events."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from data import Pair, find
from texts import blocks
from torch.utils.data import TensorDataset

NOTE_ON, NOTE_OFF, TIME_SHIFT, VELOCITY, END, PAD, VOCABULARY = 0, 128, 256, 356, 388, 389, 390
"""First event of each kind: 128 notes on, 128 off, 100 shifts by 10 ms to 1 s, 32 velocities; END, PAD; their number.

Blocks hold neither END nor PAD: they are whole, and lie within a piece.
"""

LONGEST_SHIFT = 100  # in steps of 10 ms
SUSTAIN_PEDAL = 64  # controller; pressed from the value 64 on

MAESTRO_ADVICE = (
    "Unpack https://storage.googleapis.com/magentadata/datasets/maestro/v2.0.0/maestro-v2.0.0-midi.zip there, "
    "so that it holds maestro-v2.0.0/ with maestro-v2.0.0.csv and the years' folders. To try the command without data: "
    "`--stand-in`."
)


class Note(NamedTuple):
    """A note that sounds from ``start`` to ``end``, in seconds."""

    start: float
    end: float
    pitch: int
    velocity: int


class Message(NamedTuple):
    """What a track says at a tick: the status byte without its channel, the channel, and the data bytes."""

    tick: int
    kind: int
    channel: int
    data: bytes


TEMPO = 0x51  # meta event; kept under its own number, which is no status byte
OFF, ON, CONTROL = 0x80, 0x90, 0xB0


def maestro(folder: Path, n_train: int = 5000, n_targets: int = 178, length: int = 256) -> Pair:
    """The first blocks of the training pieces in the order of their file names, and of the test pieces."""
    inner = folder / "maestro-v2.0.0"
    folder = inner if inner.is_dir() else folder
    table = find(folder, ["maestro-v2.0.0.csv"], MAESTRO_ADVICE)
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"split", "midi_filename"} <= rows[0].keys():
        raise ValueError(f"Expected {table} to have the columns split and midi_filename. {MAESTRO_ADVICE}")
    pieces = {
        split: sorted((row["midi_filename"] for row in rows if row["split"] == split), key=lambda name: Path(name).name)
        for split in ("train", "test")
    }
    train, targets = (
        first_blocks((to_events(read_midi(find(folder, [name], MAESTRO_ADVICE))) for name in pieces[split]), n, length)
        for split, n in (("train", n_train), ("test", n_targets))
    )
    return train, targets


def first_blocks(pieces: Iterable[list[int]], n: int, length: int) -> TensorDataset:
    """Up to ``n`` blocks, piece after piece; no more pieces are read than it takes."""
    cut = (blocks(torch.tensor(events), length) for events in pieces if len(events) > length)
    single = (pair for part in cut for pair in part)
    chosen = list(itertools.islice(single, n))
    if not chosen:
        raise ValueError(f"Expected pieces of more than {length} events, but found none.")
    x, y = zip(*chosen, strict=True)
    return TensorDataset(torch.stack(x), torch.stack(y))


def to_events(notes: Iterable[Note]) -> list[int]:
    """Write notes as events; times are rounded to 10 ms, no note is shorter, and velocities are rounded down to 4."""
    changes = []
    for note in notes:
        start = round(100 * note.start)
        end = max(round(100 * note.end), start + 1)
        changes += [(end, NOTE_OFF, note.pitch, 0), (start, NOTE_ON, note.pitch, note.velocity // 4)]
    events, now, loudness = [], 0, None
    # At the same time a note ends before it starts again.
    for time, kind, pitch, velocity in sorted(changes, key=lambda change: (change[0], -change[1], change[2])):
        while now < time:
            step = min(time - now, LONGEST_SHIFT)
            events.append(TIME_SHIFT + step - 1)
            now += step
        if kind == NOTE_ON and velocity != loudness:
            events.append(VELOCITY + velocity)
            loudness = velocity
        events.append(kind + pitch)
    return events


def read_midi(path: Path) -> list[Note]:
    """Read the notes of a standard MIDI file, ordered by their starts; the sustain pedal holds them.

    Raises:
        ValueError: if the file is none, or is cut short.
    """
    try:
        division, tracks = read_chunks(path.read_bytes())
        messages = sorted((m for track in tracks for m in read_track(track)), key=lambda message: message.tick)
        return sorted(held_notes(timed(messages, division)))
    except (IndexError, ValueError) as error:
        raise ValueError(f"Expected {path} to be a standard MIDI file, but {error}.") from None


def read_chunks(content: bytes) -> tuple[int, list[bytes]]:
    """Split a file into the division of its header and the bytes of its tracks."""
    if content[:4] != b"MThd" or len(content) < 14:
        raise ValueError(f"it starts with {content[:4]!r} instead of a header")
    position = 8 + int.from_bytes(content[4:8], "big")
    tracks = []
    while position + 8 <= len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "big")
        body = content[position + 8 : position + 8 + size]
        if len(body) < size:
            raise ValueError("it is cut short")
        if content[position : position + 4] == b"MTrk":
            tracks.append(body)
        position += 8 + size
    if len(tracks) != int.from_bytes(content[10:12], "big"):
        raise ValueError(f"it has {len(tracks)} tracks instead of {int.from_bytes(content[10:12], 'big')}")
    return int.from_bytes(content[12:14], "big", signed=True), tracks


def read_track(track: bytes) -> Iterator[Message]:
    """Read the messages of a track that matter here: notes, controls and tempo."""
    position = tick = 0
    status = None
    while position < len(track):
        delta, position = variable_length(track, position)
        tick += delta
        if track[position] & 0x80:
            status = track[position]
            position += 1
        if status is None or not status & 0x80:
            raise ValueError("a track starts without a status byte")
        if status in {0xFF, 0xF0, 0xF7}:  # meta event, system exclusive
            kind = track[position] if status == 0xFF else None
            size, position = variable_length(track, position + (status == 0xFF))
            if kind == TEMPO:
                yield Message(tick, TEMPO, 0, track[position : position + size])
            position += size
            status = None  # neither may be followed by data bytes alone
            continue
        size = 1 if status & 0xF0 in {0xC0, 0xD0} else 2
        data = track[position : position + size]
        position += size
        if len(data) < size or max(data) > 127:
            raise ValueError("a message is cut short")
        if status & 0xF0 in {OFF, ON, CONTROL}:
            yield Message(tick, status & 0xF0, status & 0x0F, data)


def variable_length(track: bytes, position: int) -> tuple[int, int]:
    """Read a number of seven bits a byte, and the position behind it."""
    value = 0
    while True:
        byte = track[position]
        value, position = value << 7 | byte & 0x7F, position + 1
        if byte < 0x80:
            return value, position


def timed(messages: Iterable[Message], division: int) -> Iterator[tuple[float, Message]]:
    """Give each message its time in seconds; ticks are parts of a beat, or of a frame if the division is negative."""
    if division == 0:
        raise ValueError("its ticks have no length")
    frames, ticks_per_frame = -(division >> 8), division & 0xFF
    tick, time, beat = 0, 0.0, 0.5  # 120 beats a minute until a tempo is set
    for message in messages:
        seconds_per_tick = beat / division if division > 0 else 1 / (frames * ticks_per_frame)
        time += (message.tick - tick) * seconds_per_tick
        tick = message.tick
        if message.kind == TEMPO:
            beat = int.from_bytes(message.data, "big") / 1e6
        else:
            yield time, message


def held_notes(messages: Iterable[tuple[float, Message]]) -> Iterator[Note]:
    """Pair starts and ends; a note that ends while its channel's pedal is down sounds until the pedal is up.

    It ends earlier if it is struck again, and at the last message at the latest.
    """
    sounding: dict[tuple[int, int], tuple[float, int]] = {}
    held: set[tuple[int, int]] = set()
    pedal: set[int] = set()
    time = 0.0
    for time, message in messages:  # the last time is used behind the loop
        channel, (number, value) = message.channel, message.data
        key = (channel, number)
        ended: list[tuple[int, int]] = []
        if message.kind == CONTROL:
            if number == SUSTAIN_PEDAL and value >= 64:
                pedal.add(channel)
            elif number == SUSTAIN_PEDAL:
                pedal.discard(channel)
                ended = [k for k in held if k[0] == channel]
        elif key in sounding and ((message.kind == ON and value > 0) or channel not in pedal):
            ended = [key]
        elif key in sounding:
            held.add(key)
        for k in ended:
            start, velocity = sounding.pop(k)
            held.discard(k)
            yield Note(start, time, k[1], velocity)
        if message.kind == ON and value > 0:
            sounding[key] = (time, value)
    for k, (start, velocity) in sounding.items():
        yield Note(start, time, k[1], velocity)
