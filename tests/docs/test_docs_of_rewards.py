"""docs/rewards.md says of each pretrained reward what its card says; the examples of docs/how_to/own_reward.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mfm_rewards
from mfm_rewards.testing import check_reward

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "rewards.md").read_text()
GUIDE = (DOCS / "how_to/own_reward.md").read_text()
PRETRAINED = [n for n in mfm_rewards.available() if getattr(mfm_rewards.registry.factory(n), "card", None) is not None]


@pytest.mark.parametrize("name", PRETRAINED)
def test_the_tables_are_the_cards(name):
    card = mfm_rewards.registry.factory(name).card
    rows = [line for line in TEXT.splitlines() if line.startswith(f"| `{name}`")]
    assert len(rows) == 2
    for value in (card.measures, card.values, card.memory, card.licence, card.source):
        assert f"| {value} |" in rows[0]
    assert f"`{card.fetch}`" in rows[1]


def test_every_reward_is_in_the_tables():
    of = {
        n: mfm_rewards.registry.factory(n).__module__ or "" for n in mfm_rewards.available()
    }  # none: of a page's code
    ours = [name for name, module in of.items() if module.startswith("mfm_rewards.")]
    assert ours
    assert not [name for name in ours if f"`{name}`" not in TEXT]


def test_the_examples_run():
    before, scope = dict(mfm_rewards.registry._FACTORIES), {}
    try:
        for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL):
            exec(code, scope)
        scope["test_top_heavy"]()
        check_reward(mfm_rewards.build("likes_red", scale=2.0)).raise_for_failures()
    finally:
        mfm_rewards.registry._FACTORIES.clear()
        mfm_rewards.registry._FACTORIES.update(before)
