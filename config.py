"""The one config object. Every setting of the engine, its default and its help text.

`actorserve run` derives its flags from these fields (names as SGLang's where they exist), `Engine(...)` takes
them as keyword arguments, and the supervisor hands the resolved object to every actor. Imports nothing of ours:
any layer may use it. Settings that can be computed are `None` here and filled in by the part that knows.
"""

from typing import Annotated, Literal

import msgspec

Meta = msgspec.Meta
Positive = Annotated[int, Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings. A field's `Meta.description` is its help text on the command line."""

    model: Annotated[
        str | None,
        Meta(
            description="folder with config.json, a .gguf file, a hub's name for one (org/name, org/name:Q4_K_M), or "
            "all-MiniLM-L6-v2; without it the embedded SmolLM2-135M chat model"
        ),
    ] = None
    revision: Annotated[str | None, Meta(description="branch, tag or commit of a hub's model")] = None
    download_source: Annotated[
        Literal["huggingface", "modelscope"], Meta(description="the hub that names without a folder are looked for on")
    ] = "huggingface"
    served_model_name: Annotated[str | None, Meta(description="name in /v1/models")] = None
    tokenizer_path: Annotated[str | None, Meta(description="tokenizer folder, if not the model's")] = None
    skip_tokenizer_init: Annotated[bool, Meta(description="serve token ids only")] = False
    chat_template: Annotated[str | None, Meta(description="file with a Jinja chat template")] = None
    tool_call_parser: Annotated[
        str, Meta(description="how the model writes tool calls: hermes, llama3, mistral, ...; auto: by its template")
    ] = "auto"
    reasoning_parser: Annotated[
        str, Meta(description="how it marks its thoughts: qwen3, deepseek-r1, ...; none; auto: by its template")
    ] = "auto"
    sampling_defaults: Annotated[
        Literal["model", "openai"],
        Meta(
            description="where temperature, top_p, top_k, min_p and repetition_penalty come from that a request to an "
            "OpenAI or Anthropic route leaves out: the model's generation_config.json, or OpenAI's defaults"
        ),
    ] = "model"
    load_format: Annotated[
        Literal["auto", "safetensors", "gguf", "dummy", "stub"],
        Meta(description="dummy: random weights of config.json's shape; stub: no model, tokens by a hash, for tests"),
    ] = "auto"
    stub_step_ms: Annotated[float, Meta(ge=0, description="with --load-format stub: time of a step")] = 1.0
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        Meta(
            description="weights and activations; auto: the checkpoint's, on a CPU float32 beside weights that stay "
            "quantized or of 16 bits (experts: bfloat16 if it has instructions for it); on a CPU bfloat16 rounds what "
            "is multiplied, nothing else; on a GPU weights stay bfloat16 beneath float32"
        ),
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "gguf", "fp8", "int8"],
        Meta(
            description="auto: multiply with a checkpoint's quantized weights as they are, where it can be done (on a "
            "CPU: if no --dtype is given, in float32); none: dequantise them; gguf: a GGUF file's, CPU only, or an "
            "error; fp8 (GPU), int8: quantise the layers of one that is not quantized, while loading"
        ),
    ] = "auto"
    is_embedding: Annotated[
        bool,
        Meta(
            description="serve embeddings instead of text; not needed for models that generate none: encoders, "
            "sentence-transformers' folders, classification heads"
        ),
    ] = False
    embedding_attention: Annotated[
        Literal["auto", "causal", "bidirectional"],
        Meta(description="what an embedding model's tokens see: those before them, or all; auto: as config.json says"),
    ] = "auto"
    context_length: Annotated[Positive | None, Meta(description="default: the model's")] = None
    random_seed: Annotated[int, Meta(ge=0, description="base of the seeds of requests that bring none")] = 0

    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 picks a free one")] = 30000
    http_workers: Annotated[
        int, Meta(ge=1, le=64, description="processes that speak HTTP on this port; each has its own connections")
    ] = 1
    api_key: Annotated[str | None, Meta(description="key that every request must bring, but those for health")] = None
    api_key_file: Annotated[
        str | None,
        Meta(description="TOML file of [[keys]]: name, key, tokens_per_minute, weight, ..."),
    ] = None
    cors_origins: Annotated[
        str | None, Meta(description="web pages that may call the server: origins with commas between, or *")
    ] = None
    ssl_certfile: Annotated[str | None, Meta(description="certificate chain (PEM): serve https")] = None
    ssl_keyfile: Annotated[str | None, Meta(description="its private key (PEM), if in a file of its own")] = None
    ssl_ca_certs: Annotated[
        str | None,
        Meta(description="certificates (PEM) by which clients' own must be signed; default: they need none"),
    ] = None
    root_path: Annotated[str, Meta(description="path under which a proxy has the server, e.g. /llm")] = ""
    access_log: Annotated[str | None, Meta(description="file for a JSON line a request; - is stdout")] = None
    otlp_endpoint: Annotated[
        str | None, Meta(description="collector of OpenTelemetry traces, e.g. http://localhost:4318 (extra: otlp)")
    ] = None
    resumable_streams: Annotated[
        bool, Meta(description="every stream can be resumed for 60 s by Last-Event-ID, not just those that ask for it")
    ] = False
    data_dir: Annotated[
        str | None, Meta(description="folder for files and batches, which survive a restart; without it there are none")
    ] = None
    profile_dir: Annotated[
        str | None, Meta(description="folder for the traces of /start_profile; without it there are none")
    ] = None
    weights_root: Annotated[
        str | None,
        Meta(description="folder in which the models of /update_weights_from_disk must lie; without it: none"),
    ] = None
    allow_image_urls: Annotated[bool, Meta(description="fetch images that requests name by http(s) addresses")] = False
    allowed_media_domains: Annotated[
        str | None,
        Meta(description="hosts, separated by commas, that images are fetched from, also private ones; no others then"),
    ] = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    max_queued_requests: Annotated[Positive, Meta(description="requests in the engine before 429")] = 4096
    max_queued_tokens: Annotated[Positive, Meta(description="prompt tokens in the engine before 429")] = 16 << 20
    max_queued_bytes: Annotated[
        Positive, Meta(description="bytes that the requests of a front may come to, at worst, before 429")
    ] = 4 << 30
    max_batch_prompts: Annotated[Positive, Meta(description="prompts in one request")] = 1024
    max_n: Annotated[int, Meta(ge=1, le=128, description="continuations of one prompt: n, best_of")] = 128
    max_logprobs: Annotated[int, Meta(ge=0, le=20, description="top logprobs of one token")] = 20
    max_grammar_bytes: Annotated[Positive, Meta(description="largest schema, pattern or grammar of a request")] = (
        1 << 20
    )
    max_body_bytes: Annotated[Positive, Meta(description="largest HTTP body before 413")] = 8 << 20
    max_images: Annotated[int, Meta(ge=0, description="images of one prompt, for a model that takes any")] = 16
    max_video_frames: Annotated[int, Meta(ge=1, description="frames of a video")] = 128
    max_image_pixels: Annotated[int, Meta(ge=1, le=1 << 27, description="pixels of an image before 400")] = 50_000_000
    image_url_seconds: Annotated[float, Meta(gt=0, description="for fetching an image before 400")] = 10.0
    max_file_bytes: Annotated[Positive, Meta(description="largest file of /v1/files before 413")] = 200 << 20
    max_headers: Annotated[Positive, Meta(description="headers of an HTTP request before 431")] = 100
    max_header_bytes: Annotated[Positive, Meta(description="largest address and headers before 431")] = 32 << 10
    max_connections: Annotated[
        Positive | None,
        Meta(description="open connections of a front before 503; default: what its open files allow, 16384 at most"),
    ] = None
    client_timeout: Annotated[
        float,
        Meta(gt=0, description="seconds for a request's headers, and for a client that sends or reads below 1 KiB/s"),
    ] = 30.0

    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="auto: cuda if there is a GPU")] = "auto"
    tp_size: Annotated[Positive, Meta(description="tensor parallel ranks: GPUs that share the model")] = 1
    dp_size: Annotated[
        int, Meta(ge=1, le=64, description="replicas of the model, each with its own GPUs, cache and queue")
    ] = 1
    nnodes: Annotated[int, Meta(ge=1, le=64, description="machines that the replicas are on, as many on each")] = 1
    node_rank: Annotated[
        int, Meta(ge=0, description="which of them this is; 0 has the HTTP server, the others only replicas")
    ] = 0
    dist_init_addr: Annotated[
        str | None, Meta(description="HOST:PORT of node 0 at which the other machines join, in a private network")
    ] = None
    node_key_file: Annotated[
        str | None, Meta(description="file with the key that all machines share, at least 32 bytes")
    ] = None
    node_timeout: Annotated[
        float, Meta(gt=0, description="seconds without a word after which another machine counts as lost")
    ] = 5.0
    load_balance_method: Annotated[
        Literal["cache_aware", "round_robin", "shortest_queue"],
        Meta(description="which replica gets a request; cache_aware: one that has its beginning, unless it is busy"),
    ] = "cache_aware"
    attention_backend: Annotated[
        Literal["auto", "torch", "triton", "flashinfer"],
        Meta(description="auto: torch on CPU; on a GPU Triton, for prefill FlashInfer where installed and compiled"),
    ] = "auto"
    kv_cache_dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"],
        Meta(
            description="auto: as activations; float16, bfloat16: half the KV cache of a model in float32, as most are "
            "on a CPU, where long contexts are faster then; fp8, which is fp8_e4m3, and fp8_e5m2: half that of 16 bits"
        ),
    ] = "auto"
    disable_cuda_graph: Annotated[bool, Meta(description="launch every kernel of a decode step by itself")] = False
    cuda_graph_max_bs: Annotated[
        Positive | None, Meta(description="largest decode batch run as a CUDA graph; default: the largest batch")
    ] = None
    enable_torch_compile: Annotated[
        bool, Meta(description="small operations by torch.compile instead of our Triton kernels (GPU)")
    ] = False
    mem_fraction_static: Annotated[
        Annotated[float, Meta(gt=0, lt=1)] | None,
        Meta(description="share of memory for weights and KV pages; default .88 on a GPU, .25 on a CPU"),
    ] = None
    max_total_tokens: Annotated[Positive | None, Meta(description="KV pool size in tokens; default from memory")] = None
    max_running_requests: Annotated[Positive | None, Meta(description="default 256, 64 on CPU")] = None
    cpu_threads: Annotated[Positive | None, Meta(description="torch threads; default: all cores")] = None

    schedule_policy: Annotated[
        Literal["lpm", "fcfs", "dfs-weight", "random"], Meta(description="order of the waiting queue")
    ] = "lpm"
    schedule_conservativeness: Annotated[
        float, Meta(ge=0, description="scales the expected new tokens at admission; higher retracts less")
    ] = 1.0
    chunked_prefill_size: Annotated[
        int | None,
        Meta(
            description="prompt tokens per forward; <= 0 disables chunking; default 256 on CPU, on a GPU 8448, "
            "while others decode 256, while more than 192 do 384"
        ),
    ] = None
    max_prefill_tokens: Annotated[Positive, Meta(description="prompt tokens per forward without chunking")] = 16384
    num_continuous_decode_steps: Annotated[Positive, Meta(description="most decode steps per schedule (k)")] = 16
    window_ms: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(
            description="k adapts so that a window stays near this; 0: k is always num_continuous_decode_steps; "
            "default 10, 30 on CPU"
        ),
    ] = None
    plans_in_flight: Annotated[int, Meta(ge=1, le=4, description="windows queued ahead on the executor")] = 2
    disable_jump_forward: Annotated[
        bool, Meta(description="draw tokens that a grammar forces one by one; the output is the same")
    ] = False
    grammar_backend: Annotated[
        Literal["auto", "fsm", "llguidance"],
        Meta(description="auto: tables where a grammar has them, else llguidance's parser; or only one of the two"),
    ] = "auto"
    grammar_seconds: Annotated[
        float, Meta(gt=0, description="time to compile a request's grammar; one that needs more is refused")
    ] = 1.0
    disable_radix_cache: Annotated[bool, Meta(description="compute every prompt from its first token")] = False
    kv_checksums: Annotated[
        bool, Meta(description="check that KV pages hold what was written when they are used again (CPU; costs time)")
    ] = False
    eviction_policy: Annotated[Literal["lru", "lfu"], Meta(description="which cached prefix goes first")] = "lru"

    placement: Annotated[
        Literal["process", "inline"], Meta(description="process: one process per actor; inline: all actors in one loop")
    ] = "process"
    hang_seconds: Annotated[
        float, Meta(gt=0, description="an actor that does not react, or computes no step, for this long is restarted")
    ] = 60.0
    max_restarts: Annotated[
        int, Meta(ge=0, description="deaths of one actor in a minute after which the engine gives up")
    ] = 3
    drain_timeout: Annotated[
        float, Meta(ge=0, description="seconds that running requests have to end after SIGTERM; Ctrl-C waits for none")
    ] = 10.0

    @property
    def page_size(self) -> int:
        """Tokens per KV page. Reuse is token-exact all the same: a partly shared page is copied."""
        return 16

    @property
    def executors(self) -> int:
        """How many this machine has: one a GPU, or on a CPU one a process."""
        return self.tp_size * len(self.replicas_here)

    @property
    def replicas_here(self) -> range:
        """Numbers of this machine's replicas."""
        each = self.dp_size // self.nnodes
        return range(self.node_rank * each, (self.node_rank + 1) * each)

    def machine_of(self, replica: int) -> int:
        """The --node-rank of the machine that has this replica."""
        return replica // (self.dp_size // self.nnodes)


class Thoughts(msgspec.Struct, frozen=True, array_like=True):
    """Token ids that begin and end thoughts."""

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    opened: bool = False
    """The output begins amid thoughts."""


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How a model that generates nothing makes one vector of a prompt (models/pooling.py)."""

    kind: Literal["last", "mean", "cls"]
    """Which hidden states it is made of: the last token's, the mean of all, the first token's."""
    task: Literal["embed", "classify"]
    """What it is: the pooled hidden state, or what a classification head makes of that, a logit for each label."""
    width: int
    """Numbers in it."""
    normalize: bool = True
    """Embeddings have length 1 unless a request wants otherwise."""
    causal: bool = True
    """A token sees only those before it, so that the KV of a prompt's beginning can be shared."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    several: bool = False
    """More than one class may hold: their probabilities are apart, and do not sum to 1."""
    raw: bool = False
    """How well two texts fit is the logit itself, not its sigmoid: what some cross-encoders' folders want."""

    @property
    def whole(self) -> bool:
        """Prompts are computed in one forward each."""
        return not self.causal

    @property
    def reuses(self) -> bool:
        """What is cached of a prompt's beginning need not be computed again."""
        return self.causal and self.kind == "last"


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What everybody must know of the model before it is loaded; read from its folder by the root, without torch."""

    name: str
    path: str  # folder with config.json (a GGUF file is converted into one first)
    model_type: str
    vocab_size: int
    context_length: int
    eos_ids: tuple[int, ...]
    sampling: dict[str, float] = {}
    """SamplingParams' fields where requests to OpenAI's and Anthropic's routes leave them out."""
    has_chat_template: bool = False
    tool_parser: str = "json"
    """Name of the family in which it writes tool calls (models/tool_families.py)."""
    reasoning_parser: str | None = None
    """Name of the family in which it marks thoughts (models/reasoning_parser.py)."""
    thoughts: Thoughts | None = None
    """The tags of that family, if each is a token."""
    pooling: Pooling | None = None
    """None: it generates text."""
    image_token_id: int | None = None
    """The token that stands for an image in a prompt; None: the model takes none."""
    video_token_id: int | None = None
    """The same of videos."""
