from __future__ import annotations

import random
from pathlib import Path

import midi
import pytest
import torch
from data import MissingDataError
from midi import Note

BEAT = 500  # ticks: with the tempo that holds until another is set, a tick is 1 ms


def delta(ticks: int) -> bytes:
    """Seven bits a byte, the highest bit set on all but the last."""
    digits = [ticks & 0x7F]
    while ticks := ticks >> 7:
        digits.append(ticks & 0x7F | 0x80)
    return bytes(reversed(digits))


def chunk(name: bytes, body: bytes) -> bytes:
    return name + len(body).to_bytes(4, "big") + body


def midi_file(*tracks: list[tuple[int, bytes]], division: int = BEAT) -> bytes:
    """Each track is a list of (ticks since the event before, message)."""
    header = (1).to_bytes(2, "big") + len(tracks).to_bytes(2, "big") + division.to_bytes(2, "big", signed=True)
    bodies = [b"".join(delta(ticks) + message for ticks, message in track) for track in tracks]
    return chunk(b"MThd", header) + b"".join(chunk(b"MTrk", body) for body in bodies)


def tempo(microseconds: int) -> bytes:
    return b"\xff\x51\x03" + microseconds.to_bytes(3, "big")


ON, OFF, PEDAL = b"\x90", b"\x80", b"\xb0\x40"


def notes_of(tmp_path: Path, content: bytes) -> list[Note]:
    (tmp_path / "a.midi").write_bytes(content)
    return [Note(round(n.start, 6), round(n.end, 6), *n[2:]) for n in midi.read_midi(tmp_path / "a.midi")]


@pytest.mark.parametrize(
    ("track", "expected"),
    [
        ([(0, ON + b"\x3c\x40"), (500, OFF + b"\x3c\x00")], [Note(0, 0.5, 60, 64)]),
        ([(7, ON + b"\x3c\x40"), (500, ON + b"\x3c\x00")], [Note(0.007, 0.507, 60, 64)]),  # velocity 0 ends a note
        (  # running status, and a time of two bytes
            [(0, ON + b"\x3c\x40"), (0, b"\x40\x50"), (300, b"\x3c\x00"), (1, b"\x40\x00")],
            [Note(0, 0.3, 60, 64), Note(0, 0.301, 64, 80)],
        ),
        (  # a text, a system exclusive message, a program change and an end of track in between
            [(0, b"\xff\x01\x02hi"), (0, b"\xf0\x02\x01\xf7"), (0, b"\xc0\x05"), (0, ON + b"\x3c\x40"),
             (9, b"\x3c\x00"), (0, b"\xff\x2f\x00")],
            [Note(0, 0.009, 60, 64)],
        ),
        (  # the pedal holds a note until it is up
            [(0, PEDAL + b"\x7f"), (0, ON + b"\x3c\x40"), (100, b"\x3c\x00"), (200, PEDAL + b"\x00")],
            [Note(0, 0.3, 60, 64)],
        ),
        (  # and ends it when it is struck again
            [(0, PEDAL + b"\x40"), (0, ON + b"\x3c\x40"), (100, b"\x3c\x00"), (50, b"\x3c\x20"),
             (50, b"\x3c\x00"), (200, PEDAL + b"\x3f")],
            [Note(0, 0.15, 60, 64), Note(0.15, 0.4, 60, 32)],
        ),
        (  # a key that is still down outlasts the pedal
            [(0, PEDAL + b"\x7f"), (0, ON + b"\x3c\x40"), (100, PEDAL + b"\x00"), (100, ON + b"\x3c\x00")],
            [Note(0, 0.2, 60, 64)],
        ),
        (  # the pedal of another channel does nothing
            [(0, b"\xb1\x40\x7f"), (0, ON + b"\x3c\x40"), (100, b"\x3c\x00"), (100, b"\xb1\x40\x00")],
            [Note(0, 0.1, 60, 64)],
        ),
        ([(0, ON + b"\x3c\x40"), (80, b"\xb0\x07\x00")], [Note(0, 0.08, 60, 64)]),  # ends with the last message
        ([(0, OFF + b"\x3c\x00")], []),
        ([], []),
    ],
)  # fmt: skip
def test_a_track_is_read_as_notes(tmp_path: Path, track: list[tuple[int, bytes]], expected: list[Note]) -> None:
    assert notes_of(tmp_path, midi_file(track)) == expected


def test_tempo_changes_hold_for_all_tracks(tmp_path: Path) -> None:
    conductor = [(0, tempo(1_000_000)), (1000, tempo(250_000))]
    piano = [(500, ON + b"\x3c\x40"), (1000, ON + b"\x3c\x00")]
    # 500 ticks at 2 ms; then 500 more at 2 ms and 500 at 0.5 ms.
    assert notes_of(tmp_path, midi_file(conductor, piano)) == [Note(1.0, 2.25, 60, 64)]


def test_ticks_may_be_parts_of_a_frame(tmp_path: Path) -> None:
    track = [(0, tempo(250_000)), (500, ON + b"\x3c\x40"), (500, ON + b"\x3c\x00")]
    division = (-25 << 8) | 40  # 25 frames per second of 40 ticks each: 1 ms
    assert notes_of(tmp_path, midi_file(track, division=division)) == [Note(0.5, 1.0, 60, 64)]


def test_chunks_that_are_no_tracks_are_passed_over(tmp_path: Path) -> None:
    content = midi_file([(0, ON + b"\x3c\x40"), (500, b"\x3c\x00")])
    assert len(notes_of(tmp_path, content[:14] + chunk(b"XFIH", b"abc") + content[14:])) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "starts with b'' instead of a header"),
        (b"RIFF" + bytes(30), "starts with b'RIFF' instead"),
        (midi_file([(0, ON + b"\x3c\x40"), (500, b"\x3c\x00")])[:-3], "it is cut short"),
        (midi_file([], [])[:-8], "it has 1 tracks instead of 2"),
        (midi_file([(0, b"\x3c\x40")]), "starts without a status byte"),
        (midi_file([(0, ON + b"\x3c")]), "a message is cut short"),
        (midi_file([(0, ON + b"\x3c\x90")]), "a message is cut short"),
        (midi_file([(0, ON + b"\x3c\x40")], division=0), "its ticks have no length"),
        (chunk(b"MThd", b"\0\0\0\1\1\xf4") + chunk(b"MTrk", b"\x81"), "index out of range"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.midi to be a standard MIDI file, but .*{message}"):
        notes_of(tmp_path, content)


def decoded(events: list[int]) -> list[Note]:
    """The notes that events mean."""
    time, velocity, sounding, notes = 0, None, {}, []
    for event in events:
        if event < midi.NOTE_OFF:
            assert event not in sounding
            sounding[event] = time, velocity
        elif event < midi.TIME_SHIFT:
            start, loudness = sounding.pop(event - midi.NOTE_OFF)
            notes.append(Note(start, time, event - midi.NOTE_OFF, loudness))
        elif event < midi.VELOCITY:
            time += event - midi.TIME_SHIFT + 1
        else:
            assert event < midi.END
            assert event - midi.VELOCITY != velocity, "said twice"
            velocity = event - midi.VELOCITY
    assert not sounding
    return sorted(notes)


@pytest.mark.parametrize("seed", range(5))
def test_events_say_the_notes_to_ten_milliseconds_and_four_steps_of_velocity(seed: int) -> None:
    chance, notes = random.Random(seed), []
    for pitch in range(50, 60):
        end = 0.0
        for _ in range(5):
            start = end + chance.choice((0.0, 0.0304, 0.5, 3.7))
            end = start + chance.choice((0.011, 0.2, 2.003))
            notes.append(Note(start, end, pitch, chance.randrange(1, 128)))
    expected = [Note(round(100 * n.start), round(100 * n.end), n.pitch, n.velocity // 4) for n in notes]
    events = midi.to_events(chance.sample(notes, len(notes)))
    assert decoded(events) == sorted(expected)


def test_events_of_one_note_are_those_of_the_performance_representation() -> None:
    # Velocity 64 is bin 16; 1.23 s are shifts of 1 s and of 0.23 s.
    events = midi.to_events([Note(0.0, 1.23, 60, 64)])
    assert events == [356 + 16, 60, 256 + 99, 256 + 22, 128 + 60]
    assert midi.to_events([Note(0.0, 0.0, 60, 64)])[-2:] == [256, 128 + 60]  # no note is shorter than 10 ms


def piece(pitch: int, n: int) -> bytes:
    strokes = [(delay, ON + bytes([pitch, v])) for _ in range(n) for delay, v in ((10, 64), (10, 0))]
    return midi_file(strokes)


def write_maestro(folder: Path) -> None:
    rows = {"2018/b.midi": ("train", 61, 12), "2004/c.midi": ("train", 62, 12), "2017/a.midi": ("train", 60, 12)}
    rows |= {"2018/d.midi": ("test", 63, 12), "2018/e.midi": ("validation", 64, 12), "2018/short.midi": ("test", 65, 1)}
    folder.mkdir(parents=True)
    lines = ["canonical_composer,canonical_title,split,year,midi_filename"]
    for name, (split, pitch, n) in rows.items():
        lines.append(f'"A, B",title,{split},2018,{name}')
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(piece(pitch, n))
    (folder / "maestro-v2.0.0.csv").write_text("\n".join(lines), "utf-8")


@pytest.mark.parametrize("inner", [".", "maestro-v2.0.0"])
def test_maestro_is_cut_into_blocks_in_the_order_of_file_names(tmp_path: Path, inner: str) -> None:
    write_maestro(tmp_path / "data" / inner)
    train, targets = midi.maestro(tmp_path / "data", n_train=7, n_targets=99, length=16)
    x, y = train.tensors
    assert (x.shape, x.dtype, len(targets)) == ((7, 16), torch.int64, 3)
    assert torch.equal(x[:, 1:], y[:, :-1])
    # 49 events a piece make three blocks; a, b, and the first of c.
    pitches = [[int(e) for e in row.unique() if e < 128] for row in x]
    assert pitches == [[60]] * 3 + [[61]] * 3 + [[62]]
    events = midi.to_events(midi.read_midi(tmp_path / "data" / inner / "2017" / "a.midi"))
    assert x[:3].flatten().tolist() == events[:48]
    assert y[2, -1] == events[48]
    assert targets.tensors[0].max() < midi.END


def test_missing_maestro_says_where_it_is_and_how_it_lies(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no maestro-v2\.0\.0\.csv there\. Unpack https://storage"):
        midi.maestro(tmp_path)
    write_maestro(tmp_path / "data")
    (tmp_path / "data" / "2017" / "a.midi").unlink()
    with pytest.raises(MissingDataError, match=r"no 2017/a\.midi there\. Unpack"):
        midi.maestro(tmp_path / "data")


def test_a_table_without_the_columns_and_pieces_that_are_too_short_are_refused(tmp_path: Path) -> None:
    write_maestro(tmp_path / "data")
    with pytest.raises(ValueError, match="Expected pieces of more than 400 events, but found none"):
        midi.maestro(tmp_path / "data", length=400)
    (tmp_path / "data" / "maestro-v2.0.0.csv").write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(ValueError, match=r"to have the columns split and midi_filename\. Unpack"):
        midi.maestro(tmp_path / "data")
