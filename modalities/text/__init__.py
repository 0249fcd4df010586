"""Text from a prompt: masked or continuous diffusion with a bidirectional transformer of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from suite.errors import ConfigError
from suite.files.inputs import is_file, read_text
from suite.files.untrusted import Items, Kind, OneOf, Whole, parse_json
from suite.files.untrusted import Text as TextKind
from suite.modalities.text import vocabulary
from suite.modalities.text.sources import plain
from suite.modality import Modality
from suite.request import Request, RequestOption

if TYPE_CHECKING:  # the file endings are checked before torch is loaded
    import torch
    from torch import Tensor, nn

    from suite.diffusion.denoiser import Cond, Denoiser
    from suite.diffusion.rng import SampleRng
    from suite.host.models import ModelFolder

TEXT, JSONL = ".txt", ".jsonl"
SIDECAR = ".json"
FAMILIES = ("masked", "continuous")


class Text(Modality):
    """One opened text model.

    x is [B, L] tokens for the masked family, and [B, L, D] embeddings for the continuous one; L is the room for the
    text, which ends earlier where the model says so. Artifacts are strings, all in lower case.
    """

    name: ClassVar[str] = "text"
    suffixes: ClassVar[tuple[str, ...]] = (TEXT, JSONL)
    joins: ClassVar[tuple[str, ...]] = (JSONL,)
    beside: ClassVar[tuple[str, ...]] = (SIDECAR,)
    reads: ClassVar[tuple[str, ...]] = (TEXT,)
    printable: ClassVar[bool] = True
    interface: ClassVar[tuple[str, ...]] = (*Modality.interface, "family")
    facts: ClassVar[Mapping[str, Kind]] = MappingProxyType(
        {
            "family": OneOf(FAMILIES),
            "lengths": Items(Whole(1, 65_536), 2, 2),
            "width": Whole(1, 65_536),
            "embeddings": TextKind(100),
            "outputs": Whole(1, 10**7),
        }
    )
    vocabulary: ClassVar[str] = "tokenizer.json"
    calibration_prompts: ClassVar[tuple[str, ...]] = (
        "disaster (noun)", "run (verb)", "sentence: water", "speech: peace, nations",
    )  # fmt: skip
    options: ClassVar[tuple[RequestOption, ...]] = (
        RequestOption("length", int, "Tokens of room for the text; a word has about 1.3.", low=4, high=512),
        RequestOption("start", str, "Words with which the text begins, if any; they stay as they are."),
    )
    headline: ClassVar[Mapping[str, int]] = MappingProxyType(
        {"perplexity": -1, "blind_r5": 1, "relevance": 1, "mauve": 1}
    )

    def __init__(self, folder: ModelFolder, device: str, dtype: torch.dtype) -> None:
        import torch

        from suite.diffusion import noise
        from suite.diffusion.prediction import Prediction
        from suite.modalities.text import embedding
        from suite.network import Layout, Network
        from suite.network.weights import load_network

        self.folder = folder
        self.device = device
        self.family = str(folder.fact("family"))
        self.noise = noise.from_config(folder.fact("noise"))
        self.prediction = Prediction.named(folder.fact("prediction"))
        self.shortest, _ = vocabulary.lengths(folder)
        if self.family not in FAMILIES or self.noise.discrete != (self.family == "masked"):
            raise ConfigError(
                f"model {folder.name}: family {self.family!r} with {self.noise.family} noise in suite.json; expected "
                "masked with masked noise, or continuous with continuous noise"
            )
        self.tokenizer = vocabulary.read_tokenizer(folder)
        self.pad, self.mask = vocabulary.PAD, vocabulary.MASK
        module = load_network(folder.path / str(folder.fact("network")), device, dtype, self._given())
        self.table = None
        if self.family == "masked":
            self.mask_token = vocabulary.MASK
        else:
            if float(self.noise.time_input(torch.tensor(0.5))) != 500:
                raise ConfigError(f"model {folder.name}: noise family {self.noise.family} does not tell time as 1000 t")
            self.table = embedding.read_table(folder.path / embedding.FILE, module).to(device)
        width = () if self.table is None else (self.table.shape[1],)
        masked = self.family == "masked"  # tells the network neither the time nor anything but tokens
        layout = Layout((*width, self.shortest), tokens=self.shortest, parts=masked)
        self.network = Network(module, layout, timeless=masked)

    def _given(self) -> dict[str, Tensor]:
        """The embeddings of a model that starts from the sentence encoder: they are the installed package's."""
        if (said := self.folder.facts.get("embeddings")) is None:
            return {}
        if said != vocabulary.ENCODER:
            raise ConfigError(
                f"model {self.folder.name}: embeddings {said!r} in suite.json; expected {vocabulary.ENCODER!r}"
            )
        from suite.modalities.text.pieces import EMBEDDINGS, table

        return {EMBEDDINGS: table(self.tokenizer)}

    @classmethod
    def check(cls, folder: ModelFolder, request: Request) -> None:
        tokenizer = vocabulary.read_tokenizer(folder)
        vocabulary.start(folder, tokenizer, request)
        if request.init:
            vocabulary.given(folder, tokenizer, request.init.content, request)
        for prompt in (*request.prompts, *([request.negative] if request.negative else [])):
            vocabulary.prompt_tokens(tokenizer, prompt)

    @classmethod
    def warnings(cls, folder: ModelFolder, request: Request) -> list[str]:
        from suite.modalities.shared.words import unknown

        said = [*((vocabulary.asked(p), "the prompt") for p in dict.fromkeys(request.prompts))]
        said += [(vocabulary.asked(request.negative), "--negative")]
        return [warning for words, what in said for warning in unknown(words, what)]

    def tokens(self, request: Request) -> int:
        """The room for the text."""
        return vocabulary.start(self.folder, self.tokenizer, request)[0]

    def prior(self, request: Request, rng: SampleRng) -> Tensor:
        """Masks after the given start, [B, L]; or standard normal times sigma(1), [B, L, D]."""
        import torch

        length, start = vocabulary.start(self.folder, self.tokenizer, request)
        if self.table is not None:
            return rng.normal((length, self.table.shape[1])) * float(self.noise.sigma(1.0))
        row = torch.tensor([*start, *[self.mask] * (length - len(start))])
        return row.repeat(request.batch, 1)

    @classmethod
    def read(cls, path: Path) -> str:
        """The words of a text file, as the models write them: in lower case, on one line."""
        words = plain(read_text(path, "the file"))
        if not words:
            raise ConfigError(f"{path} holds no words")
        return words

    def to_x0(self, content: str, request: Request) -> Tensor:
        """Its tokens and then padding, [1, L]; or their embeddings, [1, L, D]."""
        import torch

        row = torch.tensor([vocabulary.given(self.folder, self.tokenizer, content, request)])
        return row if self.table is None else self.table[row.to(self.table.device)]

    def encode(self, request: Request) -> Mapping[str, Cond]:
        """Prompt tokens [B, P] and which of them count; without a negative prompt `uncond` is the empty one."""
        negative = [request.negative] * request.batch
        return {"cond": self._prompts(request.prompts), "uncond": self._prompts(negative)}

    def _prompts(self, prompts: Sequence[str]) -> Cond:
        import torch

        rows = [vocabulary.prompt_tokens(self.tokenizer, p) for p in prompts]
        tokens = torch.tensor([row + [self.pad] * (vocabulary.PROMPT - len(row)) for row in rows])
        mask = torch.tensor([[k < len(row) for k in range(vocabulary.PROMPT)] for row in rows])
        return {"prompt": tokens.to(self.device), "mask": mask.to(self.device)}

    def forward(self, module: nn.Module, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """Logits [B, L, V] of masked tokens, or the mean embedding [B, L, D] under the predicted distribution.

        With `positions` [B, A] in `cond`, logits [B, A, V] of the masked tokens at these places.
        """
        import torch

        from suite.modalities.text import embedding
        from suite.modalities.text.network import part_logits, text_logits

        if self.table is None:
            if (positions := cond.get("positions")) is not None:
                return part_logits(module, x, cond["prompt"].shape[1] + positions)
            return text_logits(module, cond["prompt"], cond["mask"], x)
        before = cond.get("before")
        before = torch.zeros_like(x) if before is None else before
        # `time` is 1000 t: a noise family that tells its networks another number is refused on loading.
        seen = embedding.network_input(x, before.to(x), self.noise, time / 1000, module)
        return embedding.estimate(text_logits(module, cond["prompt"], cond["mask"], seen), self.table)

    def denoiser(self, inner: Denoiser, request: Request) -> Denoiser:
        """Continuous: the network is shown its last estimate, and the given start is held in every estimate."""
        if self.table is None:
            return inner
        import torch

        from suite.modalities.text.conditioning import SelfConditioned

        _, start = vocabulary.start(self.folder, self.tokenizer, request)
        return SelfConditioned(inner, self.table[torch.tensor(start, dtype=torch.long)])

    def decode(self, x0: Tensor, request: Request) -> list[str]:
        """Strings, one a row. Embeddings are rounded to the nearest token's."""
        if self.table is not None:
            x0 = (x0.to(self.table) @ self.table.T).argmax(-1)  # rows of equal length: nearest = largest product
        return [vocabulary.written(self.tokenizer, row) for row in x0.tolist()]

    def why_empty(self, artifact: str) -> str:
        """No letter and no digit in it."""
        if any(letter.isalnum() for letter in artifact):
            return ""
        return "the model wrote no words. Try another --seed, or a longer --length"

    def save(self, artifact: str, path: Path, metadata: Mapping[str, Any]) -> None:
        """The text and a newline; or as .jsonl one line {"text", "prompt", "suite", "index"}."""
        content = artifact
        if path.suffix.lower() == JSONL:
            prompts = metadata.get("suite", {}).get("prompts", [])
            prompt = prompts[metadata["index"]] if prompts else ""
            content = json.dumps({"text": artifact, "prompt": prompt, **metadata}, ensure_ascii=False)
        path.write_text(content + "\n", encoding="utf-8")

    def extras(self, artifact: str, metadata: Mapping[str, Any]) -> Mapping[str, Callable[[Path], None]]:
        """A JSON file of the metadata, beside the text."""

        def write(path: Path) -> None:
            path.write_text(json.dumps({"text": artifact, **metadata}, ensure_ascii=False) + "\n", encoding="utf-8")

        return {SIDECAR: write}

    @classmethod
    def read_metadata(cls, path: Path) -> Mapping[str, Any]:
        """The metadata of a .jsonl, or of the JSON file beside a .txt."""
        place = path if path.suffix.lower() == JSONL else path.with_name(path.name + SIDECAR)
        if not is_file(place) and is_file(path.with_suffix(SIDECAR)):
            place = path.with_suffix(SIDECAR)  # its name in earlier versions
        if not is_file(place):
            raise ConfigError(f"{path} was not made by this suite, or {place.name} beside it is lost")
        lines = read_text(place, "the record").splitlines()
        if len(lines) > 1 and place == path:
            raise ConfigError(f"{path} holds {len(lines)} texts; give a file of one: `sed -n 1p {path} > first{JSONL}`")
        content = _record(lines[0] if lines else "{}", place)
        if place == path.with_suffix(SIDECAR) and content["text"] + "\n" != read_text(path, "the text"):
            raise ConfigError(f"{path} was not made by this suite, or {path.name}{SIDECAR} beside it is lost")
        return _without_text(content)

    @classmethod
    def read_whole(cls, path: Path) -> Sequence[Mapping[str, Any]]:
        """The metadata of each line of a .jsonl; of a .txt whose record is of this text."""
        if path.suffix.lower() == JSONL:
            lines = read_text(path, "the texts").splitlines()
            return [_without_text(_record(line, path)) for line in lines]
        content = _record(read_text(path.with_name(path.name + SIDECAR), "the record"), path)
        if content["text"] + "\n" != read_text(path, "the text"):
            raise ConfigError(f"{path} is not the text that {path.name}{SIDECAR} is of")
        return [_without_text(content)]

    @classmethod
    def benchmark_prompts(cls) -> tuple[str, ...]:
        """The words of 300 definitions that training never saw, evenly over the dictionary."""
        return cls._held_out()[0]

    @classmethod
    def ceiling(cls) -> dict[str, float]:
        """The numbers of those definitions themselves."""
        from suite.modalities.text.metrics import evaluate

        prompts, texts = cls._held_out()
        return evaluate(texts, prompts)

    @staticmethod
    def _held_out() -> tuple[tuple[str, ...], tuple[str, ...]]:
        from suite.modalities.text.metrics.reference import load_real

        real = load_real().only("definition")
        rows = [len(real.texts) * k // 300 for k in range(300)]
        return tuple(real.prompts[k] for k in rows), tuple(real.texts[k] for k in rows)

    def show(self, artifact: str) -> str:
        """The text itself."""
        return artifact

    def metrics(self, artifacts: Sequence[str], prompts: Sequence[str]) -> dict[str, float]:
        """Perplexity under a trigram model, variety, repetition, divergence from real texts, relevance."""
        from suite.modalities.text.metrics import evaluate

        return evaluate(artifacts, prompts)


def _record(line: str, place: Path) -> dict[str, Any]:
    """A text with its metadata. ConfigError if a line says none."""
    content = parse_json(line, f"{place}: its metadata")
    if not isinstance(content, dict) or "suite" not in content or not isinstance(content.get("text"), str):
        raise ConfigError(f"{place} was not made by this suite: it has no keys 'suite' and 'text'")
    return content


def _without_text(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("text", "prompt")}
