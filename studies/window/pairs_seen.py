"""The share of the pairs asked for that a window shows, in held-out sequences of the recall task: the verdict cites it.

python studies/window/pairs_seen.py
"""

import numpy as np

from hybrid_attn.data.synthetic import SyntheticSequences, Task

SEQUENCES = 500  # the first held-out ones of each length
LENGTHS = (64, 1024)
WINDOWS = (4, 16, 48)


def shares(length: int) -> dict[int, float]:
    """By window: the share of queries that find their value among the last `window` tokens, the key asked for included."""
    distances = []
    for sample in SyntheticSequences(Task("recall", 4), length, None).read([(i, 0, length) for i in range(SEQUENCES)]):
        tokens = sample["tokens"]
        pairs = np.stack([tokens[:-1], tokens[1:]], 1)  # at i: the tokens i and i + 1
        for query in np.flatnonzero(sample["weights"]):  # where the key stands that is asked for; its value is the target
            same = (pairs[: query - 1] == [tokens[query], sample["targets"][query]]).all(1)
            distances.append(query - (np.flatnonzero(same)[-1] + 1))
    return {window: float(np.mean(np.array(distances) < window)) for window in WINDOWS}


def main():
    for length in LENGTHS:
        windows = (f"{share:.2f} in a window of {window}" for window, share in shares(length).items())
        print(f"{length:,} tokens:", ", ".join(windows))


if __name__ == "__main__":
    main()
