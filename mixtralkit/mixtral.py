"""What users import: build a Mixtral from a checkpoint, give it prompts or dialogs, get text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixtralkit.automatic import Automatic, choose_automatically
from mixtralkit.checkpoint import CheckpointReader, load_into, open_checkpoint
from mixtralkit.config import ModelConfig, MoEOptions, ParallelConfig, parse_dtype
from mixtralkit.distributed import RankContext
from mixtralkit.engine.chat import Message, encode_chat
from mixtralkit.engine.generation import PREFILL_BUDGET, Engine, check_prefill_budget
from mixtralkit.engine.requests import Completion, Request, StreamEvent, echoed_texts
from mixtralkit.engine.sampler import SamplingOptions
from mixtralkit.engine.tokenizer import Tokenizer
from mixtralkit.layout import RankLayout
from mixtralkit.model.transformer import Transformer
from mixtralkit.planning.formats import load_plan
from mixtralkit.planning.plan import ExpertPlan, contiguous


class Mixtral:
    """A model with its tokenizer. Over several ranks every rank makes the same calls and gets the same answers."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        seed: int = 1,
        prefill_budget: int = PREFILL_BUDGET,
        cuda_graphs: bool = True,
        weight_hash: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.weight_hash = model, tokenizer, weight_hash
        self.engine = Engine(model, tokenizer, prefill_budget, cuda_graphs=cuda_graphs)
        self.defaults = SamplingOptions(seed=seed)

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
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        attention: str = "auto",
        experts: str = "auto",
        plan: str | Path | ExpertPlan | None = None,
        options: MoEOptions | None = None,
        automatic: Automatic | None = None,
        context: RankContext | None = None,
        progress: bool = False,
        prefill_budget: int = PREFILL_BUDGET,
        cuda_graphs: bool = True,
        format: str | None = None,
        chat_template: str | Path | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> Mixtral:
        """Loads a checkpoint of any format onto the ranks that ``torchrun`` started, or onto one.

        Args:
            ckpt_dir: folder with the weights, see ``docs/checkpoints.md``.
            tokenizer_path: sentencepiece model or ``tokenizer.json``; None for the one in ``ckpt_dir``.
            max_seq_len: most tokens of a sequence, prompt and answer; None for the model's own.
            max_batch_size: sequences that run at a time over all ranks; more of them wait.
            num_gpus, model_parallel_size: the world size, for callers that state it; ``torchrun`` decides it.
            seed: decides what is drawn at a temperature above 0.
            dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``; None for bfloat16 on CUDA and float32 on a CPU.
            device: ``"cpu"`` or ``"cuda"``; None for CUDA where there is one.
            attention: ``"tp"``, ``"dp"`` or ``"auto"``: ``tp`` where the ranks divide the heads, else ``dp``; also
                ``dp`` where FasterMoE's schedule or shadows, or two phases, are on: they need rows that travel.
            experts: ``"tp"``, ``"ep"`` or ``"auto"``, which is ``ep``.
            plan: which ranks hold which experts; None for each rank its even share. ``"auto"`` takes the plan that the
                time model says is fastest of those that fit (docs/cost-model.md), and decides what ``attention`` and
                ``experts`` leave open; where no figures of this device are known it is None.
            options: how the MoE layer runs; None reads ``FMOE_FASTER_*`` for its schedule and shadows.
            automatic: what plan ``"auto"`` goes by: figures of the machine, memory, routing.
            context: the ranks, when the caller has started them.
            progress: show a bar on stderr while weights load.
            prefill_budget: most prompt tokens that a rank runs in one step.
            cuda_graphs: capture decode steps as CUDA graphs, where the device has them.
            format: which checkpoint to take where the folder holds several, as ``checkpoint.FORMATS`` calls them.
            chat_template: jinja file that dialogs are written by; None for the folder's, or else Mistral's.
            stop_token_ids: ids that end an answer, beside those that the folder's files say.
        """
        context = RankContext.start(device) if context is None else context
        with context.agreed():
            check_world_size(context.world_size, num_gpus=num_gpus, model_parallel_size=model_parallel_size)
            reader = open_checkpoint(ckpt_dir, format)
            tokenizer = Tokenizer.beside(
                ckpt_dir, tokenizer_path, reader.config.vocab_size, chat_template, stop_token_ids or ()
            )
        return cls.load(
            reader, tokenizer, context, max_seq_len, max_batch_size, seed,
            dtype=dtype, attention=attention, experts=experts, plan=plan, options=options, automatic=automatic,
            progress=progress, prefill_budget=prefill_budget, cuda_graphs=cuda_graphs,
        )  # fmt: skip

    @classmethod
    def load(
        cls,
        reader: CheckpointReader,
        tokenizer: Tokenizer,
        context: RankContext,
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        seed: int = 1,
        *,
        dtype: str | torch.dtype | None = None,
        attention: str = "auto",
        experts: str = "auto",
        plan: str | Path | ExpertPlan | None = None,
        options: MoEOptions | None = None,
        automatic: Automatic | None = None,
        progress: bool = False,
        prefill_budget: int = PREFILL_BUDGET,
        cuda_graphs: bool = True,
        hashes: bool = False,
    ) -> Mixtral:
        """As ``build``, from a checkpoint and a tokenizer that are open already; with ``hashes`` all weights are hashed
        while they are read (``weight_hash``)."""
        with context.agreed():
            SamplingOptions(seed=seed)
            check_prefill_budget(prefill_budget)
            kind = choose_dtype(dtype, context.device)
        automatic = (automatic or Automatic()).resolved(context, kind, prefill_budget)
        with context.agreed():
            config = reader.config.with_limits(max_seq_len, max_batch_size)
            tokenizer.check_vocabulary(config.vocab_size)
            options = MoEOptions.from_env() if options is None else options
            layout = choose_layout(config, context, attention, experts, plan, options, automatic)
            model = Transformer(layout, context, kind, options)
            model.allocate_cache()
        weight_hash = load_into(model.named_tensors(), layout, reader, context, progress, hashes=hashes)
        return cls(model, tokenizer, seed, prefill_budget, cuda_graphs, weight_hash)

    @classmethod
    def from_parts(cls, model: Transformer, tokenizer: Tokenizer, seed: int = 1) -> Mixtral:
        """From a model that is already there."""
        return cls(model, tokenizer, seed)

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
        **sampling: Any,
    ) -> Request:
        """A request for the engine; ``id`` names the prompt in errors and, with the seed, decides what is drawn."""
        unknown = set(sampling) - set(SamplingOptions.__dataclass_fields__)
        if unknown:
            raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
        chosen = replace(self.defaults, **{k: v for k, v in sampling.items() if v is not None})
        length = self.model.params.max_seq_len if max_gen_len is None else max_gen_len
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        return Request(
            id, encode_prompt(self.tokenizer, id, prompt), length, chosen, stops, bool(prompt_logprobs),
            tuple(stop_token_ids or ()),
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


def choose_layout(
    config: ModelConfig,
    context: RankContext,
    attention: str = "auto",
    experts: str = "auto",
    plan: str | Path | ExpertPlan | None = None,
    options: MoEOptions | None = None,
    automatic: Automatic | None = None,
) -> RankLayout:
    """This rank's share of the model; ``"auto"`` as in ``Mixtral.build``, with ``automatic`` resolved."""
    for name, value, ways in (
        ("attention", attention, ("auto", "tp", "dp")),
        ("experts", experts, ("auto", "tp", "ep")),
    ):
        if value not in ways:
            raise ValueError(f"{name} ({value!r}) must be one of {', '.join(ways)}")
    world, options = context.world_size, MoEOptions() if options is None else options
    if isinstance(plan, str | Path) and str(plan) == "auto":
        chosen = choose_automatically(config, context, attention, experts, options, automatic or Automatic())
        if chosen is not None:
            return RankLayout(config, *chosen, context.rank)
        plan = None
    if attention == "auto":
        divides = config.n_heads % world == 0 and (config.n_kv_heads % world == 0 or world % config.n_kv_heads == 0)
        rows_should_travel = options.faster.schedule or options.copies_experts
        attention = "tp" if divides and not rows_should_travel else "dp"
    if experts == "auto":
        experts = "ep"
    if plan is None:
        plan = contiguous(config.n_layers, config.num_experts, world)
    elif not isinstance(plan, ExpertPlan):
        plan = load_plan(plan, num_experts=config.num_experts, world_size=world)
    return RankLayout(config, ParallelConfig(attention, experts), plan, context.rank)


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; None is bfloat16 on CUDA and float32 on a CPU."""
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return parse_dtype(dtype)


def check_world_size(world_size: int, **stated: int | None) -> None:
    """ValueError that says how to start, where a stated number of ranks is not the real one."""
    for name, value in stated.items():
        if value is not None and value != world_size:
            raise ValueError(
                f"{name} ({value}) must equal the number of ranks ({world_size}); "
                f"start with: torchrun --standalone --nproc_per_node={value} …"
            )
