"""The settings of an audit, typed and validated; every field's docstring is its line in `--help`.

Two kinds of settings stand here: the **science** (what is computed: input, detector, sanitizer, defense, judge, models,
generation), which enters the run's fingerprint, and the **hardware** (where and how fast), which does not. Strategies
(detector, sanitizer, defense, judge) are named here and typed in their own files: a `Choice` carries a name and the
options of the class of that name.

Knows nothing of YAML, flags or files: `settings.py` reads those.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from guardalign.credentials import refuse_credentials_in
from guardalign.errors import require

EMBEDDED = "embedded"
"""Stands for the models and the sample that ship with the package."""
CONTRASTIVE = "embedded-contrastive"
"""Stands for the second CLIP that ships with the package: it never learnt what its patches show."""


@dataclass(frozen=True)
class Choice:
    """A strategy by name, with the options of its class."""

    name: str
    """the key in the strategy's table"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """its dataclass fields"""


InputFormat = Literal[
    "embedded",
    "parquet",
    "webdataset",
    "huggingface",
    "csv",
    "jsonl",
    "micro",
    "figstep",
    "figstep-suffix",
    "unconstrained",
    "mm-safetybench",
    "spa-vl-harm",
    "spa-vl-help",
    "jailbreakv-28k",
    "mssbench",
    "mossbench",
    "hades",
    "msts",
    "vlsafe",
    "vlguard",
    "xstest",
    "vqav2",
    "textvqa",
    "scienceqa-img",
    "mme",
    "mmbench",
]


@dataclass(frozen=True)
class InputConfig:
    """Where the image-prompt pairs come from."""

    format: InputFormat = "embedded"
    """layout of the data set; `embedded` is the sample that ships with the package, `micro` the micro world's proof
    scenes; the names after them are benchmarks in their own layouts"""
    path: str | list[str] = ""
    """file, folder or glob, local or an fsspec URI (s3://, gs://, ...); for `huggingface` a folder made by
    save_to_disk or a hub name; a list is read in its order"""
    split: str | None = None
    """huggingface: the split; may be left out when there is only one; benchmarks: one part alone (SD_TYPO, chat)"""
    revision: str | None = None
    """huggingface: commit, tag or branch on the hub"""
    subset: str | None = None
    """huggingface: the data set's configuration on the hub"""
    image_column: str = "image"
    """column with image bytes, a struct of bytes and path, or a path; absent or null means a text-only prompt"""
    prompt_column: str = "prompt"
    """column with the user's prompt"""
    id_column: str | None = "sample_id"
    """column with the sample's id; where it is absent, ids derive from the location"""
    category_column: str | None = "category"
    """column with the data set's category; may be absent"""
    label_column: str | None = "label"
    """column with the data set's label; may be absent"""
    passthrough: list[str] = field(default_factory=list)
    """columns copied unchanged into the results"""
    image_root: str | None = None
    """folder that relative image paths start from; None means the table's own folder"""
    max_image_pixels: int = 100_000_000
    """pictures with more pixels are refused before they are decoded [px]"""
    allow_urls: bool = False
    """pictures named by a web address (http, https; ports 80 and 443) are fetched, straight and not through a proxy;
    private and local addresses never are"""
    url_seconds: float = 20.0
    """longest time for one fetched picture, redirects included [s]"""
    url_bytes: int = 50_000_000
    """fetched pictures that are larger are refused [bytes]"""

    def __post_init__(self) -> None:
        refuse_credentials_in({"path": self.path, "image_root": self.image_root}, "input")
        for column in ("image_column", "prompt_column", "id_column", "category_column", "label_column"):
            require(getattr(self, column) != "", f"input.{column} is empty")
        require(self.max_image_pixels > 0, "input.max_image_pixels must be positive")
        require(self.url_seconds > 0, "input.url_seconds must be positive")
        require(self.url_bytes > 0, "input.url_bytes must be positive")
        needs_path = self.format not in (EMBEDDED, "micro")
        require(bool(self.path) or not needs_path, f"input.path is missing: format {self.format} needs a path")
        sentence = f"input.path is set but input.format is {self.format}; name the path's format"
        require(needs_path or not self.path, sentence)


Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ClipConfig:
    """The CLIP model that embeds patches and concepts."""

    model: str = EMBEDDED
    """open_clip architecture (ViT-B-16), hf-hub:NAME, local-dir:FOLDER, `embedded`, or `embedded-contrastive`"""
    pretrained: str | None = None
    """open_clip pretrained tag, or a local safetensors file; None for hf-hub:, local-dir: and embedded"""
    dtype: Dtype = "float32"
    """number format of weights and activations"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA when there is one"""
    batch_size: int = 32
    """pictures (or crops) per forward call"""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "clip.batch_size must be positive")


@dataclass(frozen=True)
class LvlmConfig:
    """The large vision-language model that answers."""

    model: str = EMBEDDED
    """folder or hub name of a transformers image-text-to-text checkpoint (safetensors), or `embedded`"""
    revision: str | None = None
    """hub commit, tag or branch"""
    dtype: Dtype = "float32"
    """number format of weights and activations"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes CUDA when there is one"""
    device_map: str | None = None
    """auto, balanced, ...: spreads one model over all GPUs that the actor holds (accelerate); None: one device"""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """attention backend of the language model"""
    system_prompt: str | None = None
    """system turn put before every prompt; None leaves the template's own"""
    batch_size: int = 16
    """rows decoded together; one that is done makes room for the next"""

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "lvlm.batch_size must be positive")
        require(
            self.device_map is None or self.device == "auto",
            "lvlm.device and lvlm.device_map exclude each other: leave one of them out",
        )


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is decoded."""

    max_new_tokens: int = 64
    """longest answer [tokens]"""
    temperature: float = 0.0
    """0 decodes greedily; above 0 samples from softmax(logits / temperature)"""
    top_p: float = 1.0
    """sampling: smallest set of tokens whose probability reaches top_p, in (0, 1]"""
    top_k: int = 0
    """sampling: only the k likeliest tokens; 0 takes all"""
    seed: int = 0
    """sampling: the run's seed; each row's own derives from it and the sample id"""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "generation.max_new_tokens must be positive")
        require(self.temperature >= 0, "generation.temperature must be 0 (greedy) or above")
        require(0 < self.top_p <= 1, "generation.top_p must lie in (0, 1]")
        require(self.top_k >= 0, "generation.top_k must be 0 (all) or above")


@dataclass(frozen=True)
class ImageKeeping:
    """Which pictures stay in the results."""

    keep: Literal["none", "flagged", "all"] = "none"
    """none; thumbnails of the flagged pictures; thumbnails of all"""
    thumbnail_size: int = 256
    """longest side of a kept thumbnail [px]"""

    def __post_init__(self) -> None:
        require(self.thumbnail_size > 0, "images.thumbnail_size must be positive")


@dataclass(frozen=True)
class ClusterConfig:
    """Where the work runs. Nothing here changes a row."""

    address: str | None = None
    """Ray cluster to join (auto, or ray://HOST:PORT); None: RAY_ADDRESS, else a local cluster for this run"""
    detect_actors: int = 1
    """actors in the first pool (CLIP)"""
    detect_gpus: float = 0.0
    """GPUs each of them holds; fractions share one GPU"""
    detect_cpus: float = 1.0
    """logical CPUs each of them holds"""
    generate_actors: int = 1
    """actors in the second pool (LVLM)"""
    generate_gpus: float = 0.0
    """GPUs each of them holds; above 1 goes with lvlm.device_map"""
    generate_cpus: float = 1.0
    """logical CPUs each of them holds"""
    judge_actors: int = 1
    """actors in the third pool, which is there when the judge has a model of its own or an endpoint"""
    judge_gpus: float = 0.0
    """GPUs each of them holds; fractions share one GPU"""
    judge_cpus: float = 1.0
    """logical CPUs each of them holds"""
    threads: int = 1
    """torch CPU threads in each actor and in the local engine; rows are bit-equal only under the same number"""
    isolated: bool = True
    """each pool's models work in a process of their own, watched from outside: a row that kills or hangs it costs that
    row alone; false: they work in the Ray actor, or in this process, and die with it"""
    shard_seconds: float | None = 3600.0
    """longest time a pool may take for one shard, models loaded [s]; then the rows in hand are tried one by one, each
    with this limit, and one that reaches it alone becomes an error row; null: no limit; needs cluster.isolated"""
    worker_gib: float | None = None
    """memory (resident) that a pool's process may take [GiB]; one that takes more is stopped, and the row that made it
    do so becomes an error row; null: no limit but the machine's; needs cluster.isolated"""
    log_seconds: float = 30.0
    """seconds between progress lines when the output is no terminal"""

    def __post_init__(self) -> None:
        for name in ("detect_actors", "generate_actors", "judge_actors", "threads"):
            require(getattr(self, name) > 0, f"cluster.{name} must be positive")
        for name in ("detect_gpus", "generate_gpus", "judge_gpus", "detect_cpus", "generate_cpus", "judge_cpus"):
            require(getattr(self, name) >= 0, f"cluster.{name} must be 0 or above")
        require(self.log_seconds > 0, "cluster.log_seconds must be positive")
        for name in ("shard_seconds", "worker_gib"):
            limit = getattr(self, name)
            require(limit is None or limit > 0, f"cluster.{name} must be positive, or null")


@dataclass(frozen=True)
class CalibrationRecord:
    """How a threshold was found; written by `guardalign calibrate`, checked by every audit that uses it."""

    threshold: float
    """the threshold that it speaks of"""
    num_images: int
    """benign pictures it rests on"""
    false_alarm_rate: float
    """the target: share of benign pictures that may be flagged, in (0, 1)"""
    confidence: float | None
    """share of draws of the pictures in which the target is kept; None: it is kept on average over draws"""
    method: str
    """split-conformal"""
    guardalign: str
    """version of the package that computed the scores"""
    scores_fingerprint: dict[str, Any]
    """what the scores depend on: the detector's model and taxonomy by hash, and its settings but the threshold"""


@dataclass(frozen=True)
class AuditConfig:
    """One audit."""

    recipe: str = "guardalign"
    """the packaged method that the settings begin with"""
    input: InputConfig = field(default_factory=InputConfig)
    """the data set"""
    taxonomy: str = "auto"
    """unsafe categories, text variants and benign anchors: `mlcommons`, `micro`, or a YAML file of the same form; auto
    takes micro for an embedded clip.model and mlcommons for every other"""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """the detector's model"""
    detector: Choice = field(default_factory=lambda: Choice("ot"))
    """finds unsafe patches"""
    calibration: CalibrationRecord | None = None
    """how the detector's threshold was found; stands in the files that `guardalign calibrate` writes"""
    sanitizer: Choice = field(default_factory=lambda: Choice("mask"))
    """blanks them"""
    lvlm: LvlmConfig = field(default_factory=LvlmConfig)
    """the model that answers"""
    defense: Choice = field(default_factory=lambda: Choice("guardalign"))
    """how it answers"""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """how an answer is decoded"""
    judge: Choice = field(default_factory=lambda: Choice("refusal"))
    """what is said of the answer"""
    images: ImageKeeping = field(default_factory=ImageKeeping)
    """which pictures stay in the results"""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """where the work runs"""
    output: str = "guardalign-out"
    """folder of the run: results/*.parquet and run.json"""
    engine: Literal["ray", "local"] = "ray"
    """ray: actor pools, on a local cluster when there is none; local: the same stages in a loop, Ray not needed"""
    shard_rows: int = 128
    """rows a shard: what one commit writes and what a crash can cost"""
    limit: int | None = None
    """only the first N rows"""
    max_error_fraction: float | None = None
    """exit code 1 when a larger share of rows ends in an error, in [0, 1]; None: never"""
    self_check: bool = True
    """canary rows with known answers pass through the loaded models before the first shard, and a part of them after
    every shard; a canary that fails stops the run, one that drifts marks it"""
    dry_run: bool = False
    """print the plan and the columns, check the models, run nothing"""

    def __post_init__(self) -> None:
        refuse_credentials_in(to_plain(self))
        require(self.shard_rows > 0, "shard_rows must be positive")
        require(self.limit is None or self.limit > 0, "limit must be positive")
        require(
            self.max_error_fraction is None or 0 <= self.max_error_fraction <= 1,
            "max_error_fraction must lie in [0, 1]",
        )
        require(bool(self.output), "output is empty; name a folder")


def to_plain(config: object) -> Any:
    """The settings as nested dicts, lists and scalars; a `Choice` becomes {name: ..., its options}."""
    if isinstance(config, Choice):
        return {"name": config.name, **{key: to_plain(value) for key, value in config.options.items()}}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return config
