"""The mixture's certificate in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WORDS = {
    "transport": "chosen so that carrying the mixture onto the targets costs least",
    "debiased": "chosen by optimal transport to the targets, less half the transport between two "
    "halves of the mixture",
    "energy": "chosen so that the mixture's energy distance to the targets is least",
    "nearest": "which are the shares of the sources among the nearest rows of each target",
    "chameleon": "chosen by how much each source's mean vector stands out; no target took part",
    "uniform": "the same for every source, as far as the bounds allow",
    "proportional": "in proportion to what there is, as far as the bounds allow",
}

_RANGES = {
    "transport": "weights that the certificate can't tell apart",
    "debiased": "least and greatest weight over the halves that were solved",
    "energy": "weights within two standard errors (delete-a-group jackknife)",
}
"""What the ranges are of each method that gives them."""


def method_words(mixture: Mapping[str, Any]) -> str:
    """How the weights were chosen; goes on after a comma.

    Args:
        mixture: the report of the mixture stage.
    """
    words = _WORDS[mixture.get("method", "transport")]
    if mixture.get("kl"):
        words += f", with a pull of {mixture['kl']:g} towards what there is of each source"
    return words


def range_words(mixture: Mapping[str, Any]) -> str:
    """What the range beside a weight is; empty where there are no ranges.

    Args:
        mixture: the report of the mixture stage.
    """
    return _RANGES[mixture.get("method", "transport")] if mixture.get("ranges") else ""


def certificate_sentences(mixture: Mapping[str, Any]) -> list[str]:
    """What the numbers mean, for those that are there; values are in units of transport cost.

    Args:
        mixture: the report of the mixture stage.
    """
    said = []
    pulled = mixture.get("kl")
    value, lower = mixture.get("value_sample"), mixture.get("lower_bound")
    upper, gap = mixture.get("upper_estimate"), mixture.get("gap")
    if value is not None:
        said.append(
            "On the sample that was solved, the least cost of carrying a mixture onto the targets"
            f"{', with the pull to the natural mixture,' if pulled else ''} is {value:.4g}."
        )
    if lower is not None:
        said.append(
            f"No mixture of these rows, of all that the bounds on weights allow, costs less than "
            f"{lower:.4g}: this bound holds for all selected rows, however the sample fell."
        )
    if upper is not None:
        interval = mixture.get("upper_interval")
        range_ = f" (interval {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
        said.append(
            f"Over all selected rows this mixture is estimated to cost {upper:.4g}{range_}."
        )
    if gap is not None and mixture.get("method", "transport") == "transport":
        gap = mixture["objective_gap"] if pulled else gap
        verdict = "certified" if mixture.get("certified") else "NOT within the tolerance asked for"
        said.append(
            f"So its cost{' with that pull' if pulled else ''} is estimated to be within "
            f"{gap:.2%} of the least possible "
            f"({verdict}: the tolerance is {mixture.get('tolerance', 0):.2%})."
        )
    elif gap is not None:
        said.append(
            f"That is {gap:.2%} above the bound. Transport didn't choose these weights, so this "
            "says what they cost in it, not how well they were chosen."
        )
    emitted = mixture.get("value_emitted")
    if emitted is not None:
        said.append(
            f"The rows that were emitted cost {emitted:.4g}, computed over "
            f"{mixture['value_emitted_lines']:,} lines."
        )
    if mixture.get("shrinkage"):
        energy = ", ".join(
            f"{name} {weight:.2f}" for name, weight in mixture["energy_weights"].items()
        )
        said.append(
            "Plain transport shrinks here: its own optimum has less spread than the mixture of "
            f"least energy distance ({energy}), beyond that one's error. With few targets in many "
            "dimensions transport prefers narrow sources; methods energy and debiased don't."
        )
    loss = mixture.get("loss_of_keeping")
    if loss is not None:
        said.append(
            "Keeping the proportions of the earlier mixture costs at most an estimated "
            f"{loss:.2%} over the least possible without them."
        )
    return said
