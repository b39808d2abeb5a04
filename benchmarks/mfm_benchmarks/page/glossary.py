"""Terms that a report explains where they stand: on a mouse over them, on focus, and in a list at its end."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

# a term's spellings, the first of which is its name; and what it means
TERMS: dict[tuple[str, ...], str] = {
    ("NFE",): "Number of function evaluations: calls of networks and of the reward, per sample. A gradient (backward "
    "pass) counts as one more call.",
    ("95 % interval", "95 % intervals"): "A range made from the data so that, over many repetitions, 95 of 100 such "
    "ranges contain the true value.",
    ("λ",): "Strength of the reward: samples are steered towards exp(λ · reward) times the base distribution.",
    ("Best-of-N",): "Draw N samples of the base flow and keep the one with the highest reward.",
    ("base flow",): "The pretrained flow model, without any reward.",
    ("Meta Flow Map",): "A network that draws a clean sample from a noisy state, p(x₁ | xₜ), in one step.",
    ("posterior draws", "posterior draw"): "A clean sample drawn from p(x₁ | xₜ): one that the noisy state xₜ may come "
    "from.",
    ("MFM-GF",): "Steering with draws of the Meta Flow Map, without the reward's gradient: draws are weighted by "
    "exp(reward).",
    ("MFM-G",): "Steering with draws of the Meta Flow Map and the reward's gradient through them.",
    ("MFM-Search",): "Search with draws of the Meta Flow Map: keep the best draw, add noise again, repeat.",
    ("MFM-FT",): "Fine-tuning of the flow to the reward with draws of the Meta Flow Map, off-policy.",
    ("GLASS-G",): "As MFM-G, with each draw made by several steps of the base flow (GLASS).",
    ("GLASS",): "Posterior draws from the base flow alone, by solving an inner ODE; no training, but many evaluations.",
    ("SMC-TDS",): "Twisted diffusion sampling: sequential Monte Carlo with particles moved by the DPS gradient.",
    ("FK-SDE", "FK, SDE"): "Feynman-Kac steering: particles follow the base SDE and are resampled by their rewards.",
    ("FK-GLASS", "FK, GLASS"): "Feynman-Kac steering with GLASS transitions in place of the base SDE's steps.",
    ("DPS",): "Diffusion posterior sampling: steering by the reward's gradient at the denoised mean.",
    ("FMTT",): "Flow map trajectory tilting: particles weighted along the flow map.",
    ("Diamond-GF", "Diamond-G", "Weighted Diamond Maps"): "Weighted Diamond Maps: weighted draws of a plain flow map.",
    ("noise optimisation", "Noise optimisation"): "Gradient ascent of the reward on the starting noise (ReNO).",
    ("DRaFT",): "Fine-tuning by the reward's gradient through the last sampling steps.",
    ("ReFL",): "Fine-tuning by the reward's gradient through one prediction of the clean state.",
    ("Flow-GRPO",): "Policy gradients on the steps of an SDE, with advantages within groups of samples.",
    ("DiffusionNFT",): "Fine-tuning by flow matching of a positive and a negative policy.",
    ("Fréchet distance", "Fréchet"): "Distance between two Gaussians fitted to features of samples and of real data; "
    "smaller is closer to the data. With Inception features it is FID.",
    (
        "sliced W2",
        "Sliced W2",
    ): "Wasserstein-2 distance, averaged over projections to lines; 0 for equal distributions.",
    ("MMD",): "Maximum mean discrepancy: a distance between distributions by a kernel; 0 for equal ones.",
    ("L2 to the weights", "L2 to the shares", "L2"): "Euclidean distance between two lists of numbers, here class "
    "frequencies of samples and those that are asked for.",
    ("best look-ahead", "best look-aheads"): "The best clean state that a method scored on its way to a sample.",
    ("diversity",): "Mean distance between two samples; small if all samples look alike.",
    ("tilted distribution",): "The target of steering: the base distribution times exp(reward), normalised.",
    (
        "value estimates",
        "Value estimates",
    ): "V(t, xₜ) = log E[exp(reward) | xₜ]: the reward to be expected from a state.",
    ("rollouts", "SDE rollouts", "rollout"): "Samples made from a state by many small steps of the base SDE: the "
    "reference for draws in one step.",
    ("Pearson r",): "Correlation between estimates and reference, from -1 to 1.",
    ("drift from the base flow", "equal drift"): "KL(policy || base) of the two SDEs' paths in nats: how far a policy "
    "has moved from the base flow.",
    ("held-out",): "Of rewards: not trained on. They show whether a method exploits the reward (reward hacking).",
    (
        "energy score",
        "Energy and class score",
    ): "A proper score of samples against the truth; smallest, on average, for samples of the exact posterior.",
    (
        "misfit",
    ): "Root-mean-square difference between measured and predicted data, in units of the noise; about 1 is ideal.",
    ("LoRA",): "Low-rank adaptation: small trained matrices added to a frozen network.",
    ("RAdam",): "A variant of the Adam optimiser.",
    ("EMA",): "Exponential moving average of the weights.",
}
_WORD = r"[\w-]"
_ANY = re.compile(
    "|".join(
        rf"(?<!{_WORD}){re.escape(spelling)}(?!{_WORD})"
        for spelling in sorted((s for names in TERMS for s in names), key=len, reverse=True)
    )
)
_NAME_OF = {spelling: names[0] for names in TERMS for spelling in names}
_MEANING = {names[0]: meaning for names, meaning in TERMS.items()}


class Glossary:
    """Marks terms in a page's texts, and knows which it has marked."""

    def __init__(self) -> None:
        self._here: set[str] = set()
        self._found: set[str] = set()

    def section(self) -> str:
        """A new section begins, in which terms are marked again; an empty text, for templates."""
        self._here.clear()
        return ""

    def mark(self, text: object) -> Markup:
        """The text as HTML, with the first occurrence of each term in a section marked."""
        parts, last, plain = [], 0, str(text)
        for match in _ANY.finditer(plain):
            name = _NAME_OF[match.group()]
            self._found.add(name)
            if name in self._here:
                continue
            self._here.add(name)
            meaning = escape(_MEANING[name])
            parts.append(escape(plain[last : match.start()]))
            parts.append(Markup('<abbr title="{}">{}</abbr>').format(meaning, match.group()))
            last = match.end()
        return Markup("").join([*parts, escape(plain[last:])])

    def used(self) -> list[tuple[str, str]]:
        """Name and meaning of the terms that were marked, sorted."""
        return sorted(((name, _MEANING[name]) for name in self._found), key=lambda pair: pair[0].lower())
