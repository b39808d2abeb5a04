"""`mfm rewards`: the zoo on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mfm_lightning.commands.errors import CommandLineError


def rewards(
    *,
    show: str | None = None,
    score: str | None = None,
    check: str | None = None,
    serve: str | None = None,
    images: Path | None = None,
    prompt: str | None = None,
    prompts: Path | None = None,
    label: int | None = None,
    class_names: str | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8765,
    max_request: int = 256,
    option: list[str] | None = None,
) -> None:
    """List the rewards, show, check, use or serve one.

    A reward is named by its registered name, or by its path, my_module.my_reward.

    Args:
        show: a reward; what it measures, its options, its weights and how to get them.
        score: a reward; score the images of a folder with it.
        check: a reward; run the conformance checks of mfm_rewards.testing on it.
        serve: a reward; answer the requests of other processes, whose reward is `remote`, until Ctrl-C.
        images: folder of images (--score, --check).
        prompt: text for rewards that need one; {class} stands for the name of --label.
        prompts: JSON of a text for each image, {"name.png": "..."}.
        label: class for rewards that need one.
        class_names: file of names by label; ImageNet's where left out.
        device: auto, cpu, cuda, cuda:1, ...
        host: address to serve at; 127.0.0.1 is reached from this machine alone, 0.0.0.0 from all.
        port: to serve at; 0 takes a free one.
        max_request: largest request that is served, in MB.
        option: of the reward, KEY=VALUE, the value as YAML; several after each other.

    Raises:
        CommandLineError: if options do not fit together.
        RewardError: for an unknown reward, options that do not fit, missing weights or a missing prompt; or if host and
            port cannot be served at.
        FileNotFoundError: if the folder holds no images, or there is no file of prompts.
        SystemExit: with status 1, if a checked reward fails.
    """
    chosen = {"--show": show, "--score": score, "--check": check, "--serve": serve}
    given = [flag for flag, name in chosen.items() if name is not None]
    if len(given) > 1:
        raise CommandLineError(f"{' and '.join(given)}: one at a time")
    if not given and (option or images or prompt or prompts):
        raise CommandLineError("no reward is named: give --show, --score, --check or --serve NAME")
    if score and images is None:
        raise CommandLineError("--score needs --images DIR")
    if serve and any(given is not None for given in (images, prompt, prompts, label, class_names)):
        raise CommandLineError("--serve takes images, prompts and labels from its clients: leave them out")
    if prompts is not None and images is None:
        raise CommandLineError("--prompts FILE names the images of --images DIR")
    settings = dict(_option(text) for text in option or [])

    from rich.table import Table

    import mfm_rewards
    from mfm_lightning.commands import reward_tables
    from mfm_lightning.utils.console import console
    from mfm_lightning.utils.devices import find_device

    if not given or show is not None:
        console().print(reward_tables.describe(show, settings) if show else reward_tables.listing())
        return
    reward = mfm_rewards.build(score or check or serve or "", **settings)
    reward = reward.to(find_device(device)).eval().requires_grad_(False)
    if serve:
        from mfm_lightning.commands.reward_serving import serve as answer

        answer(reward, settings, host, port, max_request)
        return
    texts = _prompts(prompt, prompts, images, label, class_names)
    if check or images is None:
        reward_tables.show_checks(reward_tables.check(reward, images, texts, label))
        return
    scores = reward_tables.score_folder(reward, images, texts, label)
    table = Table("image", str(score))
    for name, value in sorted(scores.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{value:.5g}")
    console().print(table)


def _prompts(
    prompt: str | None, prompts: Path | None, images: Path | None, label: int | None, class_names: str | None
) -> str | Callable[[str], str] | None:
    """What the command line says about prompts."""
    from mfm_lightning.commands.reward_tables import image_paths
    from mfm_rewards import RewardError
    from mfm_rewards.prompts import PLACEHOLDER, class_prompts, load_class_names
    from mfm_rewards.text_lists import read_object

    if prompts is not None and images is not None:
        if not prompts.is_file():
            raise FileNotFoundError(f"no prompts at {prompts}")
        given = read_object(prompts)
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
            raise RewardError(f'{prompts} must be an object of a text for each file, {{"name.png": "..."}}')
        if absent := [p.name for p in image_paths(images, say=False) if p.name not in given]:
            raise RewardError(f"{prompts} has no prompt for {len(absent)} images, first {absent[0]}")
        return given.__getitem__
    if prompt is None or PLACEHOLDER not in prompt:
        return prompt
    names = load_class_names(class_names)
    if label is None or not 0 <= label < len(names):
        raise RewardError(f"a prompt with {PLACEHOLDER} needs --label, in 0..{len(names) - 1}")
    return class_prompts(prompt, names)[label]


def _option(text: str) -> tuple[str, Any]:
    from mfm_lightning.commands.options import load_yaml

    key, equals, value = text.partition("=")
    if not equals:
        raise CommandLineError(f"--option {text!r} must be KEY=VALUE")
    return key, load_yaml(value)
