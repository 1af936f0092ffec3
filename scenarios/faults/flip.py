"""Flips one bit of the memory that the ranks of this process's groups share."""

from collections.abc import Iterator


def flip_in_segments(pattern: bytes, bit: int = 0) -> int:
    """Flips a bit in the first byte of each place that holds ``pattern``; gives how many.

    Contract: a process that maps a segment twice flips an even number of times, so it is for ranks
    with a process of their own, or (``tests``) for one mapping at a time.
    """
    num_flipped = 0
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        for begin, end in _segments():
            memory.seek(begin)
            content = memory.read(end - begin)
            place = content.find(pattern)
            while place >= 0:
                memory.seek(begin + place)
                memory.write(bytes([content[place] ^ (1 << bit)]))
                num_flipped += 1
                place = content.find(pattern, place + len(pattern))
    return num_flipped


def _segments() -> Iterator[tuple[int, int]]:
    """The address ranges of segments, each file once."""
    seen = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split()
            if len(fields) > 5 and "/primitives-" in fields[5] and fields[4] not in seen:
                seen.add(fields[4])
                begin, end = fields[0].split("-")
                yield int(begin, 16), int(end, 16)
