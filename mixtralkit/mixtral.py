"""What users import: build a Mixtral from a checkpoint, give it prompts or dialogs, get text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixtralkit.automatic import choose_automatically, with_free_memory
from mixtralkit.checkpoint import CheckpointReader, load_into, open_checkpoint
from mixtralkit.config import (
    CacheOptions,
    EngineConfig,
    LimitOptions,
    ModelConfig,
    ParallelConfig,
    SourceOptions,
    parse_dtype,
)
from mixtralkit.distributed import RankContext
from mixtralkit.engine.chat import Message, encode_chat
from mixtralkit.engine.generation import Engine
from mixtralkit.engine.requests import Completion, Request, StreamEvent, echoed_texts
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.moe.tiers import tier_setup
from mixtralkit.moe.weights import parse_weights
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.plan import ExpertPlan, Words, contiguous


class Mixtral:
    """A model with its tokenizer. Over several ranks every rank makes the same calls and gets the same answers."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, limits: LimitOptions | None = None,
        weight_hash: str | None = None, prefix_reuse: bool = CacheOptions.prefix_reuse,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.weight_hash = model, tokenizer, weight_hash
        limits = limits or LimitOptions()
        self.engine = Engine(
            model, tokenizer, limits.prefill_budget, cuda_graphs=limits.cuda_graphs,
            mixed_budget=limits.mixed_budget, prefix_reuse=prefix_reuse,
        )  # fmt: skip
        self.defaults = SamplingOptions(seed=limits.seed)

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        num_gpus: int | None = None,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        context: RankContext | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Mixtral:
        """MixtralKit's call: ``load`` of these and any other options of ``EngineConfig`` by name (docs/options.md).

        ``num_gpus`` and ``model_parallel_size`` are the number of ranks, for callers that state it; ``torchrun``
        decides it.
        """
        config = EngineConfig.of(
            model=ckpt_dir, tokenizer=tokenizer_path, max_seq_len=max_seq_len, max_batch_size=max_batch_size,
            num_gpus=num_gpus if model_parallel_size is None else model_parallel_size, seed=seed, **options,
        )  # fmt: skip
        return cls.load(config, context, progress=progress)

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        context: RankContext | None = None,
        source: tuple[CheckpointReader, Tokenizer] | None = None,
        progress: bool = False,
        hashes: bool = False,
    ) -> Mixtral:
        """Loads a checkpoint of any format onto the ranks that ``torchrun`` started, or onto one.

        Args:
            config: every option.
            context: the ranks, when the caller has started them.
            source: ``open_source`` of the checkpoint, when the caller has opened it.
            progress: show a bar on stderr while weights load.
            hashes: hash all weights while they are read (``weight_hash``).
        """
        context = RankContext.start(config.limits.device) if context is None else context
        with context.agreed():
            config.parallel.check_auto()
            check_world_size(context.world_size, config.limits.num_gpus)
            reader, tokenizer = open_source(config.source) if source is None else source
        config = with_free_memory(with_weights(config, reader), context)
        with context.agreed():
            architecture = reader.config.with_limits(config.cache.max_seq_len, config.limits.max_batch_size)
            layout = choose_layout(architecture, context, config, reader.found.precision)
            dtype = choose_dtype(config.limits.dtype, context.device)
            tiers = tier_setup(layout, context, config, dtype, reader)
            model = Transformer(layout, context, dtype, config.moe, tiers)
        pages = pages_of(config.cache, model)
        with context.agreed():
            model.allocate_cache(config.cache.page_size, pages)
        mapped = frozenset() if tiers is None or tiers.mapped is None else tiers.mapped.names
        weight_hash = load_into(model.named_tensors(), layout, reader, context, progress, hashes=hashes, mapped=mapped)
        return cls(model, tokenizer, config.limits, weight_hash, config.cache.prefix_reuse)

    @classmethod
    def from_parts(cls, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> Mixtral:
        """From a model that is already there."""
        return cls(model, tokenizer, LimitOptions(seed=seed))

    def close(self) -> None:
        """Leaves the group of ranks, if building joined one."""
        self.model.context.stop()

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        **more: Any,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Continues token ids.

        Args:
            prompt_tokens: ids of each prompt; any number of prompts of any lengths up to ``max_seq_len``.
            max_gen_len: most tokens to generate for each.
            temperature: 0 takes the likeliest token each time.
            top_p: see ``SamplingOptions``, as for ``top_k``, ``min_p`` and ``seed`` in ``more``.
            logprobs: also give each token's log-probability under the model (temperature 1, nothing cut).
            echo: put the prompt before the answer, in both lists; its first token's log-probability is 0.0.
            more: ``top_k``, ``min_p``, ``seed``, ``stop`` (texts that end an answer), ``stop_token_ids``.

        Returns:
            Ids of each answer without the end token, and their log-probabilities or None.
        """
        prompts = [tuple(int(token) for token in tokens) for tokens in prompt_tokens]
        options = {"temperature": temperature, "top_p": top_p, **more}
        done = self.complete(prompts, max_gen_len, prompt_logprobs=logprobs and echo, **options)
        tokens = [[*prompt, *c.tokens] if echo else c.tokens for prompt, c in zip(prompts, done, strict=True)]
        if not logprobs:
            return tokens, None
        return tokens, [[*(c.prompt_logprobs or []), *c.logprobs] for c in done]

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Continues texts: ``{"generation", "finish_reason"}`` each, with ``logprobs`` also ``tokens`` (their texts,
        which join to the generation) and ``logprobs``. Arguments as for ``generate``; ``max_gen_len`` of None generates
        up to ``max_seq_len``."""
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, not one text")
        encoded = [encode_prompt(self.tokenizer, i, prompt) for i, prompt in enumerate(prompts)]
        options = {"temperature": temperature, "top_p": top_p, **more}
        done = self.complete(encoded, max_gen_len, prompt_logprobs=logprobs and echo, **options)
        results = []
        for prompt, c in zip(encoded, done, strict=True):
            texts = echoed_texts(self.tokenizer, prompt, c) if echo else c.texts
            results.append({"generation": "".join(texts), "finish_reason": c.finish_reason})
            if logprobs:
                results[-1]["tokens"] = texts
                results[-1]["logprobs"] = [*(c.prompt_logprobs or []), *c.logprobs]
        return results

    def chat_completion(
        self,
        dialogs: Sequence[Sequence[Message]],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        **more: Any,
    ) -> list[dict[str, Any]]:
        """Answers dialogs in the folder's chat template or Mistral's:
        ``{"generation": {"role": "assistant", "content"}, "finish_reason"}`` each, with ``logprobs`` also ``tokens``
        (their texts, which join to the content) and ``logprobs``."""
        done = self.complete(dialogs, max_gen_len, temperature=temperature, top_p=top_p, **more)
        results = []
        for c in done:
            message = {"role": "assistant", "content": c.text}
            results.append({"generation": message, "finish_reason": c.finish_reason})
            if logprobs:
                results[-1]["tokens"] = c.texts
                results[-1]["logprobs"] = c.logprobs
        return results

    def stream(
        self,
        prompts: Sequence[str | Sequence[int] | Sequence[Message]],
        max_gen_len: int | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """Text as it appears, all prompts at once; an event's ``id`` is its prompt's place in the list.

        Args:
            prompts: texts, token ids or dialogs.
            should_stop: when it turns true on rank 0, every answer ends as ``"interrupted"``.
            options: ``temperature``, ``top_p``, ``top_k``, ``min_p``, ``seed``, ``stop``, ``stop_token_ids``.
        """
        requests = [self.request(i, prompt, max_gen_len, **options) for i, prompt in enumerate(prompts)]
        return self.engine.run(requests, should_stop)

    def generate_many(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Whole answers as they end, to any number of requests (``request``); of an iterator they are taken as there is
        room."""
        return (event.completion for event in self.engine.run(requests) if event.completion is not None)

    def complete(
        self,
        prompts: Sequence[str | Sequence[int] | Sequence[Message]],
        max_gen_len: int | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Whole answers to texts, token ids or dialogs, with everything known about them."""
        requests = [self.request(i, ids, max_gen_len, **options) for i, ids in enumerate(prompts)]
        return self.engine.complete(requests)

    def request(
        self,
        id: int,
        prompt: str | Sequence[int] | Sequence[Message],
        max_gen_len: int | None = None,
        stop: str | Sequence[str] | None = None,
        prompt_logprobs: bool = False,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        json_schema: str | Mapping[str, Any] | None = None,
        routed_experts: bool = False,
        **sampling: Any,
    ) -> Request:
        """A request for the engine; ``id`` names the prompt in errors and, with the seed, decides what is drawn.

        See ``Request``, and for ``sampling`` ``SamplingOptions``.
        """
        unknown = set(sampling) - set(SamplingOptions.__dataclass_fields__)
        if unknown:
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        chosen = replace(self.defaults, **{k: v for k, v in sampling.items() if v is not None})
        length = self.model.params.max_seq_len if max_gen_len is None else max_gen_len
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return Request(
            id, encode_prompt(self.tokenizer, id, prompt), length, chosen, stops, bool(prompt_logprobs),
            tuple(stop_token_ids or ()), ignore_eos=ignore_eos, min_tokens=min_tokens,
            json_schema=json.dumps(json_schema) if isinstance(json_schema, Mapping) else json_schema,
            routed_experts=routed_experts,
        )  # fmt: skip


def encode_prompt(tokenizer: Tokenizer, id: int, prompt: str | Sequence[int] | Sequence[Message]) -> tuple[int, ...]:
    """Token ids of a text (after ``<s>``), of a dialog in its template, or of token ids; errors name ``id``."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"prompt {id} is empty")
        return tuple(tokenizer.encode(prompt, bos=tokenizer.add_bos))
    if not isinstance(prompt, Sequence):
        raise ValueError(f"prompt {id} ({prompt!r}) must be a text, token ids or a list of messages")
    if len(prompt) and not isinstance(prompt[0], int):
        try:
            return tuple(encode_chat(tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompt {id}: {error}") from None
    return tuple(prompt)


def open_source(source: SourceOptions) -> tuple[CheckpointReader, Tokenizer]:
    """The checkpoint and its tokenizer, opened; ValueError where they do not fit each other."""
    reader = open_checkpoint(source.model, source.format)
    tokenizer = Tokenizer.beside(
        source.model, source.tokenizer, reader.config.vocab_size, source.chat_template, source.stop_token_ids
    )
    tokenizer.check_vocabulary(reader.config.vocab_size)
    return reader, tokenizer


def with_weights(config: EngineConfig, reader: CheckpointReader) -> EngineConfig:
    """The same, with formats that are left out as the checkpoint has them; names are whole."""
    for option, held in (("quantize", reader.weights), ("quantize_attention", reader.attention_weights)):
        name = getattr(config.limits, option)
        asked = parse_weights(name, option) if name else held
        config = config if asked.is_plain else config.but(**{option: asked.name})
    return config


def choose_layout(
    model: ModelConfig, context: RankContext, config: EngineConfig | None = None, precision: Words | None = None
) -> RankLayout:
    """This rank's share of the model; plan ``auto`` takes what fits ``memory_gb``, see ``with_free_memory``.

    ``precision`` is that of a checkpoint whose experts have several formats, for a plan that has none.
    """
    config = EngineConfig() if config is None else config
    world, asked, plan = context.world_size, config.parallel, config.parallel.plan
    limits = config.limits
    formats = parse_weights(limits.quantize), parse_weights(limits.quantize_attention, "quantize_attention")
    if not isinstance(plan, ExpertPlan) and str(plan) == "auto":
        chosen = choose_automatically(model, context, config, precision)
        if chosen is not None:
            parallel, plan = chosen
            return RankLayout(model, parallel, with_precision(plan, precision), context.rank, *formats)
        plan = None
    attention = asked.attention
    if attention == "auto":
        divides = model.n_heads % world == 0 and (model.n_kv_heads % world == 0 or world % model.n_kv_heads == 0)
        rows_should_travel = config.moe.faster.schedule or config.moe.copies_experts
        attention = "tp" if divides and not rows_should_travel else "dp"
    if plan is None:
        plan = contiguous(model.n_layers, model.num_experts, world)
    elif not isinstance(plan, ExpertPlan):
        plan = load_plan(plan, num_experts=model.num_experts, world_size=world)
    parallel = ParallelConfig(attention, "ep" if asked.experts == "auto" else asked.experts)
    return RankLayout(model, parallel, with_precision(plan, precision), context.rank, *formats)


def with_precision(plan: ExpertPlan, precision: Words | None) -> ExpertPlan:
    """The plan with these formats of experts where it has none of its own."""
    return plan if plan.precision is not None or precision is None else replace(plan, precision=precision)


def pages_of(options: CacheOptions, model: Transformer) -> int | None:
    """Pages of a rank's cache, the same on all; None for as many as its sequences can need. Collective."""
    context, size = model.context, options.page_size
    if options.cache_tokens is not None:
        return max(1, options.cache_tokens // (model.ranks_with_own_sequences * size))
    if options.cache_share is None:
        return None
    with context.agreed():
        if context.device.type != "cuda":
            raise ValueError(f"cache_share ({options.cache_share}) needs GPUs; cache_tokens says the same in tokens")
        free = torch.cuda.mem_get_info(context.device)[0]
    layout, params = model.layout, model.params
    page_bytes = 2 * params.n_layers * (layout.kv_heads[1] - layout.kv_heads[0]) * size * params.head_dim
    pages = min(context.all_gather_objects(int(options.cache_share * free) // (page_bytes * model.dtype.itemsize)))
    return max(1, min(pages, model.sequences_per_rank * -(-params.max_seq_len // size)))


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None is bfloat16 on CUDA and float32 on a CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return parse_dtype(dtype)


def check_world_size(world_size: int, num_gpus: int | None) -> None:
    """ValueError that says how to start, where the stated number of ranks is not the real one."""
    if num_gpus not in (None, world_size):
        raise ValueError(
            f"num_gpus ({num_gpus}) must equal the number of ranks ({world_size}); "
            f"start with: torchrun --standalone --nproc_per_node={num_gpus} …"
        )
