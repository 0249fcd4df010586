"""Train a text model from a YAML file: masked diffusion, or continuous diffusion over embeddings.

Both draw a canvas length, then texts that fit it, then one prompt of each; the text is followed by padding up to the
canvas, and the padding is generated too: it is how the length of a text is chosen.

masked      x_t keeps each token with chance 1 - t. The loss is the cross-entropy at masked places, weighted by 1/t
            (MDLM, Sahoo 2024, Eq. 11; LLaDA, Nie 2025, Eq. 3): a bound on the negative log-likelihood. Or its mean
            over them (MaskGIT, Chang 2022): less variance, and the same optimum where the network can reach it.
continuous  x_t = alpha e + sigma eps over unit-variance embeddings e; the loss is the cross-entropy of the tokens
            given x_t (CDCD, Dieleman 2022), whose estimate of x0 is the mean embedding under the predicted
            distribution. With chance `self_conditioning` the network sees its own estimate (Chen 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import Tensor, nn

from suite.diffusion import noise as noises
from suite.errors import ConfigError
from suite.modalities.shared.text_encoder import quiet
from suite.modalities.text import embedding, pieces
from suite.modalities.text.config import TextTraining, read
from suite.modalities.text.data import TextData, load
from suite.modalities.text.network import build, from_encoder, text_logits
from suite.modalities.text.sources import KINDS
from suite.modalities.text.vocabulary import ENCODER, MASK, NONE, PAD, PROMPT
from suite.training.export import export_folder
from suite.training.loop import TrainState, averaged
from suite.training.loop import train as run_training
from suite.training.stages import in_stages

EXPORT = "model"
"""Sub-folder of a run that gets the finished model."""
NETWORK = "transformer"
"""Sub-folder of a model with its network."""


@dataclass(frozen=True)
class Batches:
    """Training data on its device. `texts` [N, 64] and `prompts` [P, 12] are padded; `first` and `count` are the
    prompts of each text; `chances` maps a canvas length to the chance of each text that fits it."""

    texts: Tensor
    prompts: Tensor
    prompt_lengths: Tensor
    first: Tensor
    count: Tensor
    chances: Mapping[int, Tensor]
    framed: bool = False
    """Prompts have marks at both ends, as word pieces do."""

    def draw(self, canvas: int, batch: int, dropout: float, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Texts [B, canvas], prompts [B, P] and the prompts' masks [B, P]."""
        device = self.texts.device
        index = torch.multinomial(self.chances[canvas], batch, replacement=True, generator=rng)
        which = (torch.rand(batch, device=device, generator=rng) * self.count[index]).long() + self.first[index]
        dropped = torch.rand(batch, device=device, generator=rng) < dropout
        prompt, mask = self.prompts_of(which)
        prompt, mask = silent(prompt, mask, dropped, self.framed)
        return self.texts[index, :canvas], prompt, mask

    def prompts_of(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and masks [B, P] of these prompts."""
        position = torch.arange(PROMPT, device=which.device)
        return self.prompts[which], position < self.prompt_lengths[which, None]


def silent(prompt: Tensor, mask: Tensor, where: Tensor, framed: bool = False) -> tuple[Tensor, Tensor]:
    """The same prompts, but those of rows `where` say nothing: one token `NONE`, between its marks if `framed`."""
    none = torch.full_like(prompt, PAD)
    words = [int(prompt[0, 0]), NONE, PAD] if framed else [NONE]
    none[:, : len(words)] = torch.tensor(words, device=prompt.device)
    first = torch.arange(prompt.shape[1], device=prompt.device) < len(words)
    return torch.where(where[:, None], none, prompt), torch.where(where[:, None], first, mask)


class Writer(nn.Module):
    """The network, and for the continuous family its table of embeddings, called as one compiled whole."""

    def __init__(self, config: TextTraining, data: TextData) -> None:
        super().__init__()
        tokenizer = Tokenizer.from_str(data.tokenizer)
        self.network: Any = build(config.model, tokenizer.get_vocab_size(), data.outputs)
        self.table = None
        if config.model.get("start"):
            from_encoder(self.network, pieces.table(tokenizer))
            return
        hidden = self.network.config.hidden_size
        with torch.no_grad():
            self.network.get_input_embeddings().weight.copy_(embedding.start(data.vectors, hidden) * 0.05)
        if config.family == "continuous":
            self.table = nn.Parameter(embedding.start(data.vectors, config.width))

    def forward(self, prompt: Tensor, mask: Tensor, text: Tensor) -> Tensor:
        """Logits [B, L, V]; `text` is tokens or the network's input embeddings."""
        return text_logits(self.network, prompt, mask, text)


@in_stages
def train(
    config_path: Path | str,
    data: Path | str,
    out: Path | str,
    resume: bool = False,
    overrides: Sequence[str] = (),
    minutes: float | None = None,
) -> Path:
    """Train as `config_path` says, on the file that `suite data prepare text` wrote; returns the model folder.

    `overrides` are `key=value` with dotted keys, such as `train.lr=1e-3`. `out` gets checkpoints, loss.csv, texts
    `samples-<step>.txt` and, unless the run was stopped early by Ctrl-C, the folder `model`.
    """
    config, texts, out = read(config_path, overrides), load(data), Path(out)
    if bool(config.model.get("start")) != (not len(texts.vectors)):
        kind = "word pieces (without --size)" if config.model.get("start") else "a vocabulary of its own (--size 8192)"
        raise ConfigError(f"{config_path} trains over {kind}, and {data} is not of that kind: prepare it again")
    torch.manual_seed(config.train.seed)
    writer = Writer(config, texts)
    device = Accelerator(cpu=not torch.cuda.is_available()).device
    batches = make_batches(texts, config, device)
    loss = masked_loss(batches, config) if config.family == "masked" else continuous_loss(batches, config)

    def show(model: nn.Module, step: int) -> None:
        from suite.modalities.text.preview import write_samples

        write_samples(model, texts, config, out / f"samples-{step:06d}.txt")

    where = "cpu" if device.type == "cpu" else "auto"
    # One graph for each canvas: a graph for every length would be slower than all of them.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        state = run_training(writer, loss, config.train, out, resume, minutes, show, where)
    return out if state.interrupted else export(state, config, texts, out / EXPORT, out / "loss.csv")


def make_batches(data: TextData, config: TextTraining, device: torch.device) -> Batches:
    """All texts but the held-out ones, padded; each kind gets its share of the draws of every canvas."""
    lengths = data.lengths
    texts = padded(data.tokens, data.offsets, max(config.canvases))
    chances = {}
    for canvas in config.canvases:
        fits = (lengths < canvas) & ~data.held_out
        chance, shares = torch.zeros(len(data)), config.shares_at.get(canvas, config.shares)
        for kind, name in enumerate(KINDS):
            here = fits & (data.kinds == kind)
            chance[here] = shares.get(name, 0.0) / max(1, int(here.sum()))
        chances[canvas] = chance.to(device)
    count = torch.bincount(data.prompt_texts, minlength=len(data))
    prompts = padded(data.prompt_tokens, data.prompt_offsets, PROMPT)
    prompt_lengths = data.prompt_offsets.diff()
    first = count.cumsum(0) - count
    return Batches(
        texts.to(device),
        prompts.to(device),
        prompt_lengths.to(device),
        first.to(device),
        count.to(device),
        chances,
        framed=not len(data.vectors),
    )


def padded(tokens: Tensor, offsets: Tensor, length: int) -> Tensor:
    """Rows of a flat list, cut or padded to `length`: [N, length]."""
    position = offsets[:-1, None] + torch.arange(length)
    rows = tokens[position.clamp(max=len(tokens) - 1)]
    return rows.masked_fill(position >= offsets[1:, None], PAD)


def _canvas(config: TextTraining, rng: torch.Generator) -> int:
    """The canvas of this step."""
    lengths = list(config.canvases)
    shares = torch.tensor([config.canvas_shares[n] for n in lengths], device=rng.device)
    return int(lengths[int(torch.multinomial(shares, 1, generator=rng))])


def _times(batch: int, floor: float, rng: torch.Generator) -> Tensor:
    """[B] times spread evenly over [floor, 1): one uniform draw for the whole batch lowers the loss's variance."""
    offset = torch.rand(1, device=rng.device, generator=rng)
    even = (torch.arange(batch, device=rng.device) + offset) / batch
    return floor + (1 - floor) * even


def masked_loss(batches: Batches, config: TextTraining) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(writer, generator)` of one batch; see the head of this file. Nats a token, padding at `pad_weight`."""

    def loss(writer: nn.Module, rng: torch.Generator) -> Tensor:
        canvas = _canvas(config, rng)
        text, prompt, mask = batches.draw(canvas, config.canvases[canvas], config.prompt_dropout, rng)
        t = _times(len(text), config.time_floor, rng)[:, None]
        hidden = torch.rand(text.shape, device=text.device, generator=rng) < t
        logits = writer(prompt, mask, torch.where(hidden, MASK, text))
        nats = F.cross_entropy(logits.flatten(0, 1).float(), text.flatten(), reduction="none").view_as(text)
        weight = weights(text, config.pad_weight)
        if config.weighting == "mean":
            return (nats * weight * hidden).sum() / (weight * hidden).sum().clamp(min=1e-6)
        return (nats * weight * hidden / t).sum() / weight.sum()

    return loss


def weights(text: Tensor, pad: float) -> Tensor:
    """1 for the text and the place that ends it, `pad` for those after: they follow from the end."""
    after = (text == PAD) & (text.roll(1, dims=1) == PAD)
    after[:, 0] = False
    return torch.where(after, pad, 1.0)


def continuous_loss(batches: Batches, config: TextTraining) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """`loss(writer, generator)` of one batch; see the head of this file. Nats a token, padding at `pad_weight`."""
    schedule = noises.from_config(config.noise)

    def loss(model: nn.Module, rng: torch.Generator) -> Tensor:
        writer: Any = getattr(model, "_orig_mod", model)
        canvas = _canvas(config, rng)
        text, prompt, mask = batches.draw(canvas, config.canvases[canvas], config.prompt_dropout, rng)
        t = _times(len(text), config.time_floor, rng)
        table = embedding.normalised(writer.table)
        e = table[text]
        eps = torch.randn(e.shape, device=e.device, generator=rng)
        alpha, sigma = (c(t.double()).float()[:, None, None] for c in (schedule.alpha, schedule.sigma))
        x = alpha * e + sigma * eps
        before = torch.zeros_like(x)
        if torch.rand(1, device=e.device, generator=rng).item() < config.self_conditioning:
            with torch.no_grad():
                seen = model(prompt, mask, embedding.network_input(x, before, schedule, t, writer.network))
                before = embedding.estimate(seen, table)
        logits = model(prompt, mask, embedding.network_input(x, before, schedule, t, writer.network))
        nats = F.cross_entropy(logits.flatten(0, 1).float(), text.flatten(), reduction="none").view_as(text)
        weight = weights(text, config.pad_weight)
        return (nats * weight).sum() / weight.sum()

    return loss


def export(state: TrainState, config: TextTraining, data: TextData, out: Path, log: Path | None = None) -> Path:
    """Write a model folder with the averaged weights: transformer/, tokenizer.json, suite.json, and the embeddings."""
    from safetensors.torch import save_file

    with averaged(state, config.train.average) as writer:
        own: Any = writer
        weights = {k: v.detach().cpu().clone() for k, v in own.network.state_dict().items()}
        table = None if own.table is None else embedding.normalised(own.table).detach().cpu()

    def extra(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(data.tokenizer)
        if table is not None:
            save_file({"table": table.half().contiguous()}, folder / embedding.FILE)

    network: Any = build(config.model, Tokenizer.from_str(data.tokenizer).get_vocab_size(), data.outputs)
    facts, saving = description(config), {}
    if config.model.get("start"):
        facts |= {"embeddings": ENCODER, "outputs": data.outputs}
        saving["state_dict"] = saved(weights)
    with quiet():
        return export_folder(network, weights, NETWORK, facts, out, extra, log, **saving)


def saved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ships of a network that starts from the encoder: all but the embeddings, and what is tied to them."""
    tied = (pieces.EMBEDDINGS, "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    return {name: value.half().contiguous() for name, value in weights.items() if name not in tied}


def description(config: TextTraining) -> dict[str, Any]:
    """Content of suite.json."""
    continuous = config.family == "continuous"
    return {
        "name": config.name,
        "modality": "text",
        "network": NETWORK,
        "family": config.family,
        "noise": dict(config.noise),
        "prediction": "sample" if continuous else "logits",
        "lengths": [min(config.canvases), max(config.canvases)],
        **({"width": config.width} if continuous else {}),
        "defaults": dict(config.defaults),
    }
