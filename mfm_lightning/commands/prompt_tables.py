"""`mfm data --prompts`: prompt sets with their licences, and what a file of prompts holds."""

from __future__ import annotations

from collections import Counter


def show_sets() -> None:
    """All sets: number of prompts, source, licence, and where they are or the command that fetches them."""
    from mfm_lightning.sampling.prompt_sets import FETCHED, SETS, fetch_command, is_there

    for name, chosen in SETS.items():
        place = f"in {(FETCHED / name).as_posix()}" if is_there(name) else f"not here: {fetch_command(name)}"
        print(f"{name}: {chosen.count} prompts, {chosen.about}")
        if chosen.parts:
            print(f"  parts     {', '.join(f'{name}/{part}' for part in chosen.parts)}")
        print(f"  source    {chosen.source} ({chosen.paper})")
        print(f"  licence   {chosen.licence}")
        print(f"  files     {place if chosen.url else 'come with the package'}\n")


def show_prompts(given: str) -> None:
    """Number, columns, and first prompts.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_prompts`.
    """
    from mfm_lightning.sampling.prompts import read_prompts

    found = read_prompts(given)
    texts = [prompt.text for prompt in found]
    columns = list(dict.fromkeys(key for prompt in found for key in prompt.more))
    print(f"{given}: {len(found)} prompts, {len(set(texts))} different ones")
    print(f"  seeds     {sum(prompt.seed is not None for prompt in found)} of them have one")
    print(f"  columns   {', '.join(columns) or 'none besides'}")
    for key in columns:
        values = Counter(prompt.more[key] for prompt in found if isinstance(prompt.more.get(key), str))
        if 1 < len(values) <= 12:
            print(f"  {key:<9} {', '.join(f'{value} ({number})' for value, number in values.most_common())}")
    for text in texts[:3]:
        print(f"  e.g.      {text[:100]}")
