"""Which waiting items run next: a pure function, so that the schedule can be read and tested without a clock."""

from collections.abc import Sequence

from mlx_embeddings_backends.base import Prepared


def pick(waiting: Sequence[Prepared], budget: int) -> list[int]:
    """Indexes into `waiting` (oldest first, not empty) of the next batch.

    The oldest item always goes, so nothing starves and an item larger than the budget runs alone. The others of its
    group join it, those nearest to it in length first, while count x longest stays within `budget` padded tokens.
    """
    oldest = waiting[0]
    joined, longest = [0], oldest.tokens
    if oldest.tokens * 2 > budget:
        others: list[int] = []
    else:
        others = [index for index in range(1, len(waiting)) if waiting[index].group == oldest.group]
        others.sort(key=lambda index: abs(waiting[index].tokens - oldest.tokens))
    for index in others:
        longer = max(longest, waiting[index].tokens)
        if (len(joined) + 1) * longer <= budget:
            joined.append(index)
            longest = longer
        elif (len(joined) + 1) * longest > budget:
            break
    return joined
