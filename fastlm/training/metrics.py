"""What a mean cross-entropy says, in other units."""

import math


def perplexity(loss: float) -> float:
    """Of a loss in nats a token; infinite where it has no number."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_character(loss: float, characters_per_token: float) -> float:
    """Of a loss in nats a token; comparable between vocabularies, where none of them has unknown tokens."""
    return loss / characters_per_token / math.log(2)
