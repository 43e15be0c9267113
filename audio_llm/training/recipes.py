"""Recipes of SFT and GRPO, and what all recipes of a Trainer share; read and checked before torch is imported."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from audio_llm import config
from audio_llm.audio import Hearing
from audio_llm.errors import ConfigError, describe, nearest
from audio_llm.files import content_hash
from audio_llm.model.validate import (
    MODEL_TYPE,
    check_adapter,
    check_encoder,
    check_language_model,
    expect_files,
    read_facts,
)
from audio_llm.ranges import check_numbers
from audio_llm.shards.index import ShardIndex, check_folders
from audio_llm.shards.tags import FILE as TAGS_FILE
from audio_llm.shards.tags import Tags, check_where, choose, tags_folder
from audio_llm.training.counterfactual import NAME as PAIRS
from audio_llm.training.engine_recipe import EngineRecipe
from audio_llm.training.launch import batch_layout, training_processes
from audio_llm.training.rewards import DEFAULT_WEIGHTS, build_rewards, length
from audio_llm.training.trackers import Tracker

Precision = Literal["auto", "fp32", "bf16"]
MOST_PASSES = 100  # over one folder in an epoch: beyond it a weight is a slip of the pen
Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class LoRARecipe:
    """Low-rank adapters (Hu et al. 2021): in the language model on the linears of attention and MLP, or on those of
    the names `targets` alone."""

    targets: list[Linear] = field(default_factory=lambda: list(get_args(Linear)))
    rank: int = 16  # of the two factors that a weight's change is the product of
    alpha: int = 32  # the change is multiplied by alpha / rank
    dropout: float = 0.0  # share of what comes into an adapter that is dropped in training
    rank_stabilized: bool = False  # alpha / sqrt(rank) in place of alpha / rank


@dataclass
class ModelRecipe:
    """Either `path` (a checkpoint folder, or a native audio model's) or the three parts to assemble one from.

    `encoder` is ``{path: folder}`` or ``{name: beats, published: file}``; `hearing` in it is what it hears of another
    layout: left, right, mean or each of two channels, omni of ambisonics, duplicate of one.
    """

    path: Path | None = None
    adapter: Path | None = None  # beside `path`, a run's base/: its adapter/, which goes on learning (SFT)
    encoder: dict[str, Any] | None = None
    language_model: dict[str, Any] | None = None  # {path: a Transformers folder}
    projector: dict[str, Any] | None = None  # fields of its configuration, for instance {num_query_tokens: 16}
    prompt: Literal["chat", "alpaca"] = "chat"  # of parts put together: how they are asked; alpaca: as BAT was
    attention: str = "sdpa"  # of the language model: what Transformers calls attn_implementation
    quantization: Literal["4bit", "8bit"] | None = None  # of the frozen language model, on a GPU (NF4, or int8)

    def check(self) -> None:
        """:class:`ConfigError` where neither a checkpoint nor all parts are named."""
        if self.adapter and not self.path:
            raise ConfigError(describe("model.adapter", "model.path as well, the base it was trained on", "none"))
        if self.path:
            return
        missing = "model: expected 'path', or parts to assemble;"
        if not self.encoder or not {"path", "published"} & set(self.encoder):
            raise ConfigError(f"{missing} encoder.path, or encoder.name with encoder.published, is missing.")
        if not self.language_model or "path" not in self.language_model:
            raise ConfigError(f"{missing} language_model.path is missing.")

    def check_paths(self, assembled: Path) -> None:
        """:class:`CheckpointError` for a part that is not there, unless the parts lie `assembled` in that folder."""
        if self.path:
            expect_files(f"model {self.path}", self.path, ("config.json",))
            if read_facts(self.path).get("model_type") == MODEL_TYPE:  # any other is read as a native audio model
                expect_files(f"model {self.path}", self.path, ("processor_config.json",))
        if self.path and self.adapter:
            check_adapter(self.adapter, self.path)
        if self.path or (assembled / "config.json").is_file():
            return
        assert self.encoder is not None and self.language_model is not None
        if "path" in self.encoder:
            check_encoder(self.encoder["path"])
        check_language_model(self.language_model["path"])


@dataclass(kw_only=True)
class TrainedParts:
    """How each part of the model learns: not at all, by low-rank adapters, or with all its weights."""

    encoder: Literal["frozen", "lora", "full"] = "frozen"  # lora: on its linears, or on convolutions where it has none
    projector: Literal["frozen", "full"] = "full"  # it is small: there is no LoRA for it
    language_model: Literal["frozen", "lora", "full"] = "lora"  # adapters stand on the linears of attention and MLP

    def check(self) -> None:
        """:class:`ConfigError` for parts that cannot be trained together."""
        if {self.encoder, self.projector, self.language_model} == {"frozen"}:
            raise ConfigError(describe("train", "a part that learns", "encoder, projector and language_model frozen"))
        if self.encoder == "lora" and self.language_model == "full":
            found = "encoder: lora with language_model: full"
            raise ConfigError(describe("train", "adapters for both, or none", found, "Use encoder: full or frozen."))


@dataclass(kw_only=True)
class LearningRates:
    """Rates of single parts; one that is not given is the recipe's `learning_rate`."""

    encoder: float | None = None  # of the encoder
    projector: float | None = None  # of the projector
    language_model: float | None = None  # of the language model


@dataclass(kw_only=True)
class MixedFolder:
    """A folder of shards of which an epoch takes less, or more, than each sample once, or only samples of some tags."""

    path: Path  # the folder
    weight: float | None = None  # passes over it in an epoch: 0.5 is another half of it each time
    # Which samples, by the tags that audio-llm filter gave them, as {gain: {min: 0.25}, band: [hard, medium]}; the key
    # tags in it is the folder of the tags, where they are not beside the shards.
    where: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.weight is None and self.where is None:
            raise ConfigError(describe(f"data.train: {{path: {self.path}}}", "weight or where beside it", "neither"))


@dataclass(kw_only=True)
class DataRecipe:
    """Shard folders of questions with answers, the form of a reply, and the bearable share of unusable samples.

    A folder in `train` may be ``{path: FOLDER, weight: 0.5, where: {gain: {min: 0.25}}}``; the weights of all are then
    in `weights`, and in `where` which of its samples are taken (:mod:`audio_llm.shards.tags`).

    SFT measures the loss of the replies in `validation`, GRPO how many of its own replies to them are right.

    `instruction` is said behind every question from then on, for it goes into the checkpoint's template ("": nothing;
    by default what the checkpoint says). In GRPO ``{target}`` in it is the words that the reward `length` wants.
    """

    train: list[Path | MixedFolder]  # folders of shards
    weights: list[float] | None = None  # of each of them, passes over it in an epoch; null: one
    where: list[dict[str, Any] | None] | None = None  # of each of them, which samples by their tags; null: all
    validation: list[Path] = field(default_factory=list)  # folders of shards that nothing is learnt from
    validation_samples: int | None = None  # so many of them; null: all
    # What a reply says before its answer, in tags; plain: the answer alone, without a tag.
    style: Literal["answer", "think", "think_semantics", "plain"] = "think"
    instruction: str | None = None
    max_reject_share: float = 0.01  # share of unusable samples beyond which the run stops
    hearing: Hearing = "refuse"  # of sound in another layout than the encoder's

    def __post_init__(self) -> None:
        stated = {number: one for number, one in enumerate(self.train) if isinstance(one, MixedFolder)}
        if stated:
            weights = [stated[n].weight if n in stated else None for n in range(len(self.train))]
            where = [stated[n].where if n in stated else None for n in range(len(self.train))]
            for name, found, said in (("weights", weights, self.weights), ("where", where, self.where)):
                if said is not None and any(one is not None for one in found):
                    cure = f"Leave out data.{name}."
                    raise ConfigError(describe("data", f"{name} in data.train or in data.{name}", "both", cure))
            if any(weight is not None for weight in weights):
                self.weights = [1.0 if weight is None else weight for weight in weights]
            self.where = where if any(one is not None for one in where) else self.where
            self.train = list(self.folders)
        self._check_where()
        if self.weights is None:
            return
        if len(self.weights) != len(self.train):
            expected = f"one for each of the {len(self.train)} folders of data.train"
            raise ConfigError(describe("data.weights", expected, f"{len(self.weights)}"))
        if wrong := [weight for weight in self.weights if not 0 < weight <= MOST_PASSES]:
            expected = f"passes in an epoch, above 0 and at most {MOST_PASSES}"
            raise ConfigError(describe("data: weight", expected, f"{wrong[0]:g}"))
        if set(self.weights) == {1.0}:
            self.weights = None

    def _check_where(self) -> None:
        if self.where is None:
            return
        if len(self.where) != len(self.train):
            expected = f"one for each of the {len(self.train)} folders of data.train"
            raise ConfigError(describe("data.where", expected, f"{len(self.where)}"))
        for folder, where in zip(self.train, self.where, strict=True):
            if where is not None:
                check_where(where, f"where of {folder}")
        if not any(self.where):
            self.where = None

    @property
    def tags(self) -> list[Path]:
        """The folders of the tags by which samples are chosen."""
        chosen = zip(self.folders, self.where or [], strict=bool(self.where))
        return [tags_folder(path, where) for path, where in chosen if where]

    def chosen(self) -> list[Path | ShardIndex]:
        """The folders of `train`; of one with a condition on tags, the index of those of its samples that meet it."""
        how = False, self.max_reject_share, "data.max_reject_share"
        return [
            choose(ShardIndex.load(path, *how), where, path) if where else path
            for path, where in zip(self.folders, self.where or [None] * len(self.train), strict=True)
        ]

    @property
    def digests(self) -> dict[str, Any]:
        """Digests of what is learnt from beside shards, by key."""
        return {}

    @property
    def folders(self) -> list[Path]:
        """The folders of `train`."""
        return [one.path if isinstance(one, MixedFolder) else one for one in self.train]


@dataclass(kw_only=True)
class RunRecipe:
    """What every run of a Trainer is told. Its length is the smaller of `steps` and `epochs` that are given.

    `resume` is ``auto`` (go on from the last complete checkpoint), ``never``, or a checkpoint's path; `processes` is
    how many must have been launched.
    """

    output: Path  # the run's folder
    steps: int | None = None
    epochs: float | None = None
    learning_rate: float = 1e-4  # the largest one, after the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # how the rate falls after the warm-up
    warmup_steps: int = 0  # steps in which the rate rises from zero
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # a longer gradient is shortened to it
    precision: Precision = "auto"  # auto: bf16 where the machine computes in it
    gradient_checkpointing: bool = False  # less memory for about a third more time
    log_steps: int = 1  # steps from line to line of metrics.jsonl
    report_to: list[Tracker] = field(default_factory=lambda: list[Tracker](["tensorboard"]))  # who draws these lines
    save_steps: int | None = None  # steps between checkpoints; null: none
    keep_checkpoints: int = 2  # the newest ones; older are removed
    resume: str = "auto"
    processes: int | None = None
    seed: int = 0  # of the order of samples, new weights, dropout


@dataclass(kw_only=True)
class PolicyRecipe(RunRecipe):
    """What SFT and GRPO share. The run also ends after `seconds` of training, where they are given.

    `encoder_cache` is a folder for what a frozen encoder makes of each clip: it then runs once per clip, not per epoch.
    Tokens are kept in half precision where training is, and up to `encoder_cache_gib`.
    `record_order` writes down which samples every step saw. `export` says what is left at the end: ``merged``, whole
    weights, or ``adapter``, the folders ``base/`` and ``adapter/``.
    """

    model: ModelRecipe  # where the model comes from
    data: DataRecipe  # what it learns from
    train: TrainedParts = field(default_factory=TrainedParts)  # what of it learns
    learning_rates: LearningRates = field(default_factory=LearningRates)
    lora: LoRARecipe | None = field(default_factory=LoRARecipe)  # adapters of what learns by lora
    encoder_cache: Path | None = None
    encoder_cache_gib: float | None = 100.0  # GiB of it at most; null: no limit
    seconds: float | None = None
    eval_steps: int | None = None  # steps between validations; null: at the end alone
    record_order: bool = False
    export: list[Literal["merged", "adapter"]] = field(default_factory=lambda: ["merged", "adapter"])

    def __post_init__(self) -> None:
        """Read what recipes of version 0.1 say elsewhere and ``config.ALIASES`` cannot tell."""
        if self.lora is None:
            config.note("lora: null", "train: {language_model: full}")
            self.lora = LoRARecipe()
            if self.train.language_model == "lora":
                self.train.language_model = "full"
        if self.model.encoder and "train" in self.model.encoder:
            encoder = dict(self.model.encoder)
            beside = config.build(TrainedParts, {"encoder": encoder.pop("train")}, "model.encoder.train").encoder
            if self.train.encoder not in ("frozen", beside):
                found = f"model.encoder.train: {beside} and train.encoder: {self.train.encoder}"
                raise ConfigError(describe("training of the encoder", "one way", found))
            config.note("model.encoder.train", "train.encoder")
            self.model = dataclasses.replace(self.model, encoder=encoder)
            self.train = dataclasses.replace(self.train, encoder=beside)

    def order(self, shards: Any, data: DataRecipe) -> Any:
        """The order in which a run reads the ``ShardDataset`` of `data`: a ``RunSampler`` of no samples yet."""
        from audio_llm.training.order import RunSampler

        return RunSampler(shards, self.seed, 0, data.weights)

    def stage_recipes(self) -> list[Self]:
        """What each stage of the run is told: this recipe alone, where it is not divided."""
        return [self]

    def train_folders(self) -> list[Any]:
        """The shard folders that are learnt from: the recipe's as it lists them; of stages that differ, each once."""
        lists = [stage.data.folders for stage in self.stage_recipes()]
        if all(folders == lists[0] for folders in lists):
            return list(lists[0])
        return list(dict.fromkeys(folder for folders in lists for folder in folders))

    def tags_digest(self) -> dict[str, str]:
        """A digest of the tags by which samples are chosen, by its name; nothing where none are."""
        folders = dict.fromkeys(folder for stage in self.stage_recipes() for folder in stage.data.tags)
        digests = [content_hash(folder / TAGS_FILE)[:16] for folder in folders]
        return {"data.train (tags of its samples)": " ".join(digests)} if digests else {}

    def rates(self) -> dict[str, float]:
        """The learning rate of each part; 0 of one that is frozen."""
        own, trained = vars(self.learning_rates), vars(self.train)
        rates = {part: self.learning_rate if own[part] is None else own[part] for part in own}
        return {part: 0.0 if trained[part] == "frozen" else rate for part, rate in rates.items()}

    def trained(self) -> TrainedParts:
        """How each part learns in any stage. :class:`ConfigError` for one with adapters here and all weights there."""
        ways = [vars(stage.train) for stage in self.stage_recipes()]
        union = {part: sorted({way[part] for way in ways} - {"frozen"}) for part in ways[0]}
        for part, kinds in union.items():
            if len(kinds) > 1:
                cure = "Give one of the stages a recipe of its own, with model.path=…/merged."
                raise ConfigError(describe(f"stages: train.{part}", "lora or full in all of them", "both", cure))
        return config.build(TrainedParts, {part: (kinds or ["frozen"])[0] for part, kinds in union.items()}, "stages")

    def check(self) -> None:
        """:class:`ConfigError` for values that do not fit each other."""
        for stage in self.stage_recipes():
            check_numbers(stage)
            stage.train.check()
            for part, rate in vars(stage.learning_rates).items():
                if rate is not None and (rate <= 0 or vars(stage.train)[part] == "frozen"):
                    cure = "Leave it out." if rate > 0 else f"For a part that does not learn: train.{part}: frozen."
                    found = f"{rate:g}" + (f" with train.{part}: frozen" if rate > 0 else "")
                    raise ConfigError(
                        describe(f"learning_rates.{part}", "a rate above 0 of a part that learns", found, cure)
                    )
        if self.eval_steps == 0:
            raise ConfigError(describe("eval_steps", "at least 1, or null", "0"))
        if self.eval_steps and not self.data.validation:
            cure = "Name folders of shards that are not learnt from, or leave eval_steps out."
            raise ConfigError(
                describe(f"eval_steps: {self.eval_steps}", "data.validation to evaluate on", "none", cure)
            )
        self.trained().check()
        self.model.check()
        if self.model.quantization and self.trained().language_model != "lora":
            found = self.trained().language_model
            raise ConfigError(describe("model.quantization", "train.language_model: lora, for adapters learn", found))
        if self.model.adapter and self.trained().language_model != "lora":
            found = self.trained().language_model
            raise ConfigError(describe("model.adapter", "train.language_model: lora, which goes on with it", found))
        self.instruction  # noqa: B018  (says what is wrong with it)

    @property
    def instruction(self) -> str | None:
        """``data.instruction`` in full words. Raises :class:`ConfigError` for a target that no reward has."""
        text, target = self.data.instruction, self.target_words
        if any(stage.data.instruction != text for stage in self.stage_recipes()):
            raise ConfigError(describe("stages: data.instruction", "one for the whole run, beside stages", "another"))
        if text and "{target}" in text:
            if target is None:
                cure = "Write the number itself."
                raise ConfigError(describe("data.instruction: {target}", "the reward length (GRPO)", "none", cure))
            return text.replace("{target}", f"{target:g}")
        return text

    @property
    def target_words(self) -> float | None:
        """Words of thinking that are paid for best; None where they are not counted."""
        return None

    def check_paths(self) -> None:
        """:class:`ShardError`, :class:`CheckpointError` or :class:`ConfigError` for data, a model or a checkpoint to
        resume from that is not there."""
        if self.resume not in ("auto", "never") and not Path(self.resume).is_dir():
            expected = "auto, never or the folder of a checkpoint"
            raise ConfigError(describe(f"resume {self.resume}", expected, "none of that name"))
        check_folders(self.train_folders(), self.data.validation)
        for folder in (folder for stage in self.stage_recipes() for folder in stage.data.tags):
            Tags.read(folder)
        self.model.check_paths(self.output / "start")


@dataclass(kw_only=True)
class SFTData(DataRecipe):
    """Data to learn from and to validate on. `max_length` counts tokens, audio placeholders included.

    `silent_share` of the samples are heard as silence: from them the model learns what the question alone allows, so
    that without sound it guesses among the choices instead of naming a sound that is not there. `swap_share` of those
    with sides to tell (stereo, binaural, FOA) are mirrored, in sound and in every word of question, choices, reasoning
    and answer. `order_share` of them are asked as some clients do: half with the text before the audio, half with a
    system message.
    """

    max_length: int = 4096
    silent_share: float = 0.0
    swap_share: float = 0.0
    order_share: float = 0.0
    workers: int = 0  # processes that read and decode

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("silent_share", "swap_share", "order_share"):
            if not 0 <= (share := getattr(self, name)) < 1:
                raise ConfigError(describe(f"data.{name}", "a share from 0 to below 1", f"{share:g}"))


LENGTHS = ("steps", "epochs", "seconds")
# What a stage can say for itself, and what of its data.
STAGE_KEYS = ("objective", *LENGTHS, "train", "learning_rate", "learning_rates", "schedule", "warmup_steps", "data")
STAGE_DATA = ("train", "weights", "where", "style", "silent_share", "swap_share", "order_share")


@dataclass(kw_only=True)
class SFTRecipe(PolicyRecipe):
    """A supervised fine-tuning run.

    `stages` divide it: each is a group of keys that hold in it instead of the recipe's (:data:`STAGE_KEYS`). One
    without a length of its own has the recipe's. They train one model in one run, one after the other.

    The `objective` of a stage is to ``reply``, or to ``align`` a fresh projector: to bring what it makes of a sound
    near the words for what is heard. That takes no step through the language model; replies have to follow.

    Validation tells what the audio contributes; a run in which that is nothing after `contribution_steps` (None: 50)
    warns or stops.
    """

    verb: ClassVar[str] = "sft"
    data: SFTData  # what it learns from
    stages: list[dict[str, Any]] | None = None
    objective: Literal["reply", "align"] = "reply"  # what a stage learns
    batch_size: int = 8  # samples per process and pass
    gradient_accumulation: int = 1  # passes per step
    on_no_contribution: Literal["warn", "stop"] = "warn"  # what a run does whose sound contributes nothing
    contribution_steps: int | None = None
    trainer: dict[str, Any] = field(default_factory=dict)  # further fields of Transformers' TrainingArguments

    def check(self) -> None:
        super().check()
        stages = self.stage_recipes()
        for stage in stages:
            if stage.objective == "align" and stage.train.language_model != "frozen":
                cure = "Add train: {language_model: frozen} to the stage."
                raise ConfigError(describe("stages: objective: align", "a frozen language model", "another", cure))
        if stages[-1].objective == "align":
            cure = "Add a stage that replies: the language model has to learn what to do with what it is told."
            raise ConfigError(describe("objective: align", "a stage before the last", "the last", cure))

    def stage_recipes(self) -> list[Self]:
        """What each stage is told, itself without stages. :class:`ConfigError` names the stage and the key."""
        if not self.stages:
            return [self]
        whole = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)} | {"stages": None}
        found: list[Self] = []
        here = [length for length in LENGTHS if getattr(self, length) is not None]
        if here and all(set(own) & set(LENGTHS) for own in self.stages):
            cure = f"Leave it out (on the command line: {here[0]}=), or leave out that of the stage that is to have it."
            raise ConfigError(describe(here[0], "none beside stages that all have a length of their own", "one", cure))
        for number, own in enumerate(self.stages):
            where = f"stages[{number}]"
            _known(own, STAGE_KEYS, where)
            _known(own.get("data") or {}, STAGE_DATA, f"{where}.data")
            usual: dict[str, Any] = dict.fromkeys(LENGTHS) if set(own) & set(LENGTHS) else {}
            if "learning_rate" in own:  # a rate that a stage states is that of all its parts
                usual["learning_rates"] = LearningRates()
            tree = {key: _plain(value) for key, value in (whole | usual).items()}
            if "train" in (own.get("data") or {}):  # weights and conditions are those of its own folders
                tree["data"] = tree["data"] | {"weights": None, "where": None}
            for key, value in own.items():
                tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
            if "learning_rates" not in own:  # those of parts that the stage freezes say nothing
                for part, way in tree["train"].items():
                    if way == "frozen":
                        tree["learning_rates"][part] = None
            found.append(config.build(type(self), tree, where))
        for number, (stage, after) in enumerate(itertools.pairwise(found)):
            if stage.seconds is not None and stage.data != after.data:
                cure = "Give it steps or epochs."
                raise ConfigError(
                    describe(f"stages[{number}]", "a length that is known before other data begins", "seconds", cure)
                )
        return found


def _known(tree: Any, keys: Sequence[str], where: str) -> None:
    if not isinstance(tree, dict):
        raise ConfigError(describe(where, "a group of keys", repr(tree)))
    for key in tree:
        if key not in keys:
            more = nearest(str(key), keys)
            raise ConfigError(describe(f"{where}: {key}", f"one of {', '.join(keys)}", f"'{key}'{more}"))


def _plain(value: Any) -> Any:
    """A dataclass as the group of keys that it was read from."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


@dataclass(kw_only=True)
class GymRecipe:
    """What prompts are drawn from while a run trains: a recipe of scenes, or the folder that ``audio-llm prep`` made of
    one. Its training recordings alone are used."""

    recipe: Path  # a scenes.yaml, or a data set's folder
    subset: str | None = None  # whose mix of questions is asked; null: those with choices
    workers: int = 1  # processes that draw ahead; 0: none, the trainer draws
    floor: float = 0.1  # share of its even weight that a kind keeps, though none of its groups teaches
    span: int = 32  # groups that the running share of a kind is over

    def check(self) -> None:
        """:class:`ConfigError` for values out of range."""
        if not 0 < self.floor <= 1:
            raise ConfigError(describe("data.gym.floor", "a share above 0, at most 1", f"{self.floor:g}"))
        for key, value, least in (("workers", self.workers, 0), ("span", self.span, 1)):
            if value < least:
                raise ConfigError(describe(f"data.gym.{key}", f"at least {least}", f"{value}"))


@dataclass(kw_only=True)
class GRPOData(DataRecipe):
    """Data to be asked of: folders of shards, or a `gym` in their place, which draws new scenes for every step."""

    train: list[Path | MixedFolder] = field(default_factory=list)  # folders of shards
    gym: Path | GymRecipe | None = None  # a recipe of scenes, or a group of keys

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gym, Path):
            self.gym = GymRecipe(recipe=self.gym)

    @property
    def digests(self) -> dict[str, Any]:
        return {"data.gym (its recipe)": content_hash(self.gym_file)} if self.gym else {}

    @property
    def gym_file(self) -> Path:
        """The file that says what the gym draws."""
        assert isinstance(self.gym, GymRecipe)
        folder = self.gym.recipe.is_dir()
        return self.gym.recipe / "dataset.json" if folder else self.gym.recipe


@dataclass(kw_only=True)
class GRPORecipe(PolicyRecipe):
    """A GRPO run on questions with answers; their reasoning is not used, `data.style` is what the format reward asks.

    `rewards` are names with their weights, `engine` samples the replies.
    Every step samples `group_size` replies to each of `prompts_per_step` prompts (over all processes) and makes one
    update from them, in passes of `micro_batch_size` sequences per process (None: all at once). `parity_bound` is the
    largest |Δ log p| between engine and trainer (``auto``: 1e-3 in float32; in bfloat16 the mean error of a logit is
    held to the first step's, see ``parity``; ``off`` only logs). `share_prompts` computes a prompt once for all replies
    to it in a pass (not under `gradient_checkpointing`).

    `resample_groups` is how many groups of a step, whose replies all earn the same, are drawn again for other prompts.
    `keep` says which weights are exported, the last or those that were best in validation. `on_overfit` says what the
    run does where its rewards rise and its validation falls.
    """

    verb: ClassVar[str] = "grpo"
    data: GRPOData  # what it is asked of
    rewards: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_WEIGHTS))
    engine: EngineRecipe = field(default_factory=EngineRecipe)  # what samples the replies
    prompts_per_step: int = 32
    group_size: int = 8
    micro_batch_size: int | None = None
    share_prompts: bool = True
    resample_groups: int = 0
    max_completion_length: int = 256  # tokens of a reply; a longer one is cut
    temperature: float = 1.0  # at which replies are sampled
    learning_rate: float = 1e-5  # the largest one, after the warm-up
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # how the rate falls after the warm-up
    grpo: dict[str, Any] = field(default_factory=dict)  # further fields of TRL's GRPOConfig
    parity_bound: float | Literal["auto", "off"] = "auto"
    completions_per_step: int = 4  # of each step that completions.jsonl keeps
    keep: Literal["best", "last"] = "last"
    on_overfit: Literal["warn", "stop"] = "warn"

    def check(self) -> None:
        super().check()
        if self.model.adapter:
            cure = "Merge it first: audio-llm convert merge BASE ADAPTER OUT."
            raise ConfigError(describe("model.adapter", "one model, which is GRPO's reference as well", "two", cure))
        if self.model.quantization == "8bit":
            expected = "4bit, for int8 rounds activations: engines do not"
            raise ConfigError(describe("model.quantization", expected, "8bit"))
        build_rewards(self.rewards)
        batch_layout(self, training_processes())  # now: TRL and the model take long
        self.check_gym()
        self.engine.check()
        if not 0 < self.temperature <= 2:  # what vLLM takes
            raise ConfigError(describe("temperature", "above 0, at most 2", f"{self.temperature:g}"))
        if self.resample_groups < 0:
            raise ConfigError(describe("resample_groups", "a number of groups, or 0", f"{self.resample_groups}"))
        for key, value, usual in (("keep", self.keep, "last"), ("on_overfit", self.on_overfit, "warn")):
            if value != usual and not (self.data.validation and self.eval_steps):
                expected = "data.validation and eval_steps, by which it is decided"
                raise ConfigError(describe(f"{key}: {value}", expected, "none"))
        if self.keep == "best" and (not self.save_steps or (self.eval_steps or 0) % self.save_steps):
            expected = "eval_steps that are a multiple of save_steps: what is validated must have been saved"
            found = f"eval_steps: {self.eval_steps} and save_steps: {self.save_steps or 'null'}"
            raise ConfigError(describe("keep: best", expected, found))

    def check_gym(self) -> None:
        """:class:`ConfigError` for what does not go together with a gym, or without one."""
        data = self.data
        if not isinstance(data.gym, GymRecipe):
            if not data.train:
                raise ConfigError(describe("data", "train, folders of shards, or gym, a recipe of scenes", "neither"))
            return
        data.gym.check()
        if data.train:
            cure = "Leave one of them out."
            raise ConfigError(describe("data", "train or gym, whose scenes are all new", "both", cure))
        for key in ("weights", "where"):
            if getattr(data, key) is not None:
                found = f"{getattr(data, key)}"
                raise ConfigError(describe(f"data.{key}", "none beside data.gym, which has no folders", found))
        if self.steps is None or self.epochs is not None:
            found = f"epochs: {self.epochs:g}" if self.epochs is not None else "none"
            raise ConfigError(describe("data.gym, which has no end", "steps, and no epochs", found))
        if self.encoder_cache is not None:
            found, cure = f"{self.encoder_cache}", "Leave it out: no clip comes a second time."
            raise ConfigError(describe("encoder_cache", "none beside data.gym", found, cure))
        if PAIRS in self.rewards:
            cure = "Pairs are made by audio-llm prep; learn from their folder by data.train."
            raise ConfigError(describe(f"rewards: {PAIRS}", "data.train, which has pairs", "data.gym", cure))

    def check_paths(self) -> None:
        if self.data.gym and not self.data.gym_file.is_file():
            raise ConfigError(
                describe("data.gym", "a recipe of scenes or a data set's folder", f"{self.data.gym_file}")
            )
        super().check_paths()

    def order(self, shards: Any, data: DataRecipe) -> Any:
        if self.data.gym:
            return shards  # a gym is its own order
        if PAIRS not in self.rewards:
            return super().order(shards, data)
        if data.where:
            cure = "Leave out where: a sample and its counterfactual belong together."
            raise ConfigError(describe(f"rewards: {PAIRS}", "folders of data.train as they are", "where", cure))
        from audio_llm.training.pairs import PairedOrder

        return PairedOrder(shards, self.seed, 0, data.weights)

    @property
    def target_words(self) -> float | None:
        value = self.rewards.get("length")
        usual = signature(length).parameters["target"].default
        return None if value is None else float(value.get("target", usual) if isinstance(value, dict) else usual)
