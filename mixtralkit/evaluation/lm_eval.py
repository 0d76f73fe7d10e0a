"""lm-evaluation-harness with Mixtral as its model ``mixtralkit``, on one rank or several.

The harness finds a model only where something has registered it, and importing this module does. So there is a command,
``mixtralkit lm-eval``, with all options of the harness's ``lm_eval``.

Under ``torchrun`` each rank runs the harness with all requests, and the model's calls are collective. Towards the
harness every rank is the only one, so that it gives no rank a share of the requests.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

try:
    import lm_eval.models  # noqa: F401  (its own list of models must be there before another is added)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM, hash_args
    from lm_eval.api.registry import model_registry
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is missing ({error}); install it with: pip install 'mixtralkit[eval]'"
    ) from error

from mixtralkit.config import EngineConfig
from mixtralkit.config.options import options_of
from mixtralkit.config.ranks import rank_of
from mixtralkit.distributed import RankContext
from mixtralkit.engine.chat import check_dialog
from mixtralkit.engine.requests import Request
from mixtralkit.evaluation.likelihood import Pair, loglikelihoods, token_logprobs
from mixtralkit.mixtral import Mixtral, open_source
from mixtralkit.version import __version__

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

logger = logging.getLogger("lm_eval.mixtralkit")

DEFAULT_BATCH = 8  # sequences at a time, for batch_size=auto
DEFAULT_GENERATED = 256  # tokens of an answer where a task states no limit, as for the harness's own models
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")  # options of a generation that a task may give
SAVED_TOGETHER = 512  # requests that a stopped run with a cache of answers loses at most


class MixtralLM(TemplateLM):
    """The harness's view of a Mixtral.

    Texts become tokens as in the harness's Hugging Face model: context and continuation are encoded together and cut
    at the context's length, spaces that end the context count for the continuation, and what is too long loses its
    beginning. Equal weights give equal scores.

    Args:
        mixtral: the model. Its ``max_seq_len`` must be at least one more than ``max_length``.
        max_length: most tokens that a prediction sees; the harness's sequences have one more, the last predicted one.
            None for what ``mixtral`` has room for.
        add_bos_token: whether texts begin with the begin token. The harness puts one before each whole text
            (``loglikelihood_rolling``) besides, as it does for Hugging Face tokenizers that add it.
    """

    def __init__(self, mixtral: Mixtral, max_length: int | None = None, add_bos_token: bool = True) -> None:
        super().__init__()
        room = mixtral.model.params.max_seq_len - 1
        self.max_length = room if max_length is None else _whole_number("max_length", max_length)
        if self.max_length > room:
            raise ValueError(f"max_length ({max_length}) must be less than the model's max_seq_len ({room + 1})")
        self.mixtral, self.add_bos_token = mixtral, add_bos_token
        self.context = mixtral.model.context
        self._device = self.context.device
        words = mixtral.tokenizer
        self._special_ids = {words.piece(i): [i] for i in (words.bos_id, words.eos_id, words.unk_id) if i >= 0}
        self._begin, self._end = words.piece(words.bos_id), words.piece(words.eos_id)
        self._special = re.compile(f"({'|'.join(map(re.escape, self._special_ids))})")

    @classmethod
    def build(
        cls,
        ckpt_dir: str | Path,
        tokenizer_path: str | Path | None = None,
        max_length: int | None = None,
        batch_size: int | str = DEFAULT_BATCH,
        max_batch_size: int | None = None,
        add_bos_token: bool = True,
        **options: Any,
    ) -> MixtralLM:
        """Loads a checkpoint onto the ranks that ``torchrun`` started, or onto one: what ``--model_args`` may say.

        Args:
            ckpt_dir, tokenizer_path: as for ``Mixtral.build``.
            max_length: see the class; None for the model's own ``max_seq_len``. Sizes the KV cache.
            batch_size: sequences that run at a time, over all ranks; ``"auto"`` for ``max_batch_size``, or else 8.
            options: the others of ``EngineConfig``, by name.
        """
        batch = _batch(batch_size, max_batch_size)
        config = EngineConfig.of(model=ckpt_dir, tokenizer=tokenizer_path, max_batch_size=batch, **options)
        context = RankContext.start(config.limits.device)
        with context.agreed():
            source = open_source(config.source)
            longest = source[0].config.max_seq_len
            max_length = _whole_number("max_length", longest if max_length is None else max_length)
        mixtral = Mixtral.load(config.but(max_seq_len=max_length + 1), context, source)
        atexit.register(mixtral.close)  # the harness has no call for it
        return cls(mixtral, max_length, add_bos_token)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MixtralLM:
        """From ``"ckpt_dir=ckpts,experts=ep"``; see ``create_from_arg_obj``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> MixtralLM:
        """``build`` with the values of ``--model_args``, which go before those of ``--batch_size`` and ``--device``.

        The harness's own default for ``--device``, ``cuda:0``, stands for any: each rank takes its GPU where there is
        one.
        """
        own = [name for name in inspect.signature(cls.build).parameters if name != "options"]
        replaced = {"model", "tokenizer", "max_seq_len"}
        known = [*own, *(o.name for o in options_of(EngineConfig) if o.name not in replaced.union(own))]
        for name in arg_dict:
            if name not in known:
                raise ValueError(f"model_args: unknown name {name!r}; the names are {', '.join(known)}")
        if arg_dict.get("ckpt_dir") is None:
            raise ValueError("model_args: ckpt_dir is missing, the folder with the checkpoint")
        given = {name: value for name, value in (additional_config or {}).items() if value not in (None, "cuda:0")}
        return cls.build(**{**given, **arg_dict})

    def get_model_info(self) -> dict[str, Any]:
        """What the harness's results file says of the model."""
        model = self.mixtral.model
        layout, plan = model.layout, model.layout.plan
        return {
            "mixtralkit_version": __version__,
            "model_dtype": str(model.dtype),
            "quantize": None if layout.weights.is_plain else layout.weights.name,
            "quantize_attention": None if layout.attention_weights.is_plain else layout.attention_weights.name,
            **plan.counts(),
            "ranks": self.context.world_size,
            "attention": model.layout.parallel.attention,
            "experts": model.layout.parallel.experts,
            "plan_policy": plan.policy,
            "cold_capacity_factor": plan.cold_capacity_factor,
        }

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.mixtral.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the begin token."""
        return self.mixtral.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Names the texts of ``apply_chat_template`` in the harness's cache of requests."""
        return f"mixtralkit-{self.mixtral.tokenizer.path.name}-{self.mixtral.tokenizer.n_words}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, in which ``<s>``, ``</s>`` and ``<unk>`` are those tokens, as for Hugging Face."""
        tokenizer = self.mixtral.tokenizer
        pieces = [piece for piece in self._special.split(string) if piece]
        ids = [i for p in pieces for i in self._special_ids.get(p) or tokenizer.encode(p, bos=False)]
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token and ids[:1] != [tokenizer.bos_id]
        return [tokenizer.bos_id] * add_special_tokens + ids

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Mistral's template as a text whose tokens are those of ``engine.chat.encode_chat``.

        Without ``add_generation_prompt`` the last message is the beginning of an answer, which goes on.
        """
        begun = [] if add_generation_prompt else chat_history[-1:]
        check_dialog(chat_history[: len(chat_history) - len(begun)])
        text, system = self._begin, ""
        for message in chat_history:
            if message["role"] == "system":
                system = message["content"] + "\n\n" if message["content"] else ""
            elif message["role"] == "user":
                text += f"[INST] {system}{message['content']} [/INST]"
                system = ""
            else:
                text += f" {message['content']}{self._end}"
        return text.removesuffix(self._end)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """log P(continuation | context) in nats, and whether the likeliest tokens give it, of each request."""
        self._check_alike("loglikelihood", requests)
        for request in requests:
            if not request.args[1]:
                raise ValueError(f"{_place(request)}: the continuation is empty")
        return super().loglikelihood(requests, disable_tqdm or not self.context.is_first)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """``requests``: texts, and token ids of context and continuation."""
        pairs = [self._fitting(context, continuation, texts[1]) for texts, context, continuation in requests]
        self._tell_cut(sum(len(p[0]) < len(r[1]) for p, r in zip(pairs, requests, strict=True)))
        answers: list[Any] = [None] * len(requests)
        longest_first = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for part in self._parts(longest_first):
            found = loglikelihoods(self.mixtral, [pairs[i] for i in part], progress=not disable_tqdm)
            for i, (logprob, is_greedy) in zip(part, found, strict=True):
                answers[i] = (logprob, is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log P of each request's whole text, in nats, in windows of ``max_length`` that do not overlap."""
        self._check_alike("loglikelihood_rolling", requests)
        answers: list[float] = []
        for part in self._parts(range(len(requests))):
            windows = [self._windows(requests[i].args[0]) for i in part]
            flat = [pair for own in windows for pair in own]
            logprobs = iter(token_logprobs(self.mixtral, flat, progress=not disable_tqdm))
            for i, own in zip(part, windows, strict=True):
                answers.append(math.fsum(value for _ in own for value in next(logprobs)))
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, answers[-1])
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first of their stop texts, which is not part of them."""
        self._check_alike("generate_until", requests)
        asked = [self._question(i, request) for i, request in enumerate(requests)]
        self._tell_cut(sum(is_cut for _, is_cut in asked))
        questions = sorted((question for question, _ in asked), key=lambda question: -len(question.prompt))
        answers = [""] * len(asked)
        is_shown = self.context.is_first and not disable_tqdm
        with tqdm(total=len(asked), unit="answer", disable=not is_shown) as bar:
            for done in self.mixtral.generate_many(questions):
                answers[done.id] = _until(done.text, requests[done.id])
                self.cache_hook.add_partial("generate_until", requests[done.id].args, answers[done.id])
                bar.update()
        return answers

    def _question(self, id: int, request: Instance) -> tuple[Request, bool]:
        """The engine's request, and whether its prompt was cut; ValueError names task, document and option."""
        text, given = request.args
        options = dict(normalize_gen_kwargs(given, DEFAULT_GENERATED))
        length, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        stop = [text for text in (*filter(None, options.pop("until")), self._end) if not text.startswith(" ")]
        for name, value in options.items():
            if name not in SAMPLING and (name, value) != ("num_beams", 1):
                raise ValueError(f"{_place(request)}: generation option {name} ({value!r}) is none of {SAMPLING}")
        sampling = {"temperature": 0.0, "top_p": 1.0, **{name: options[name] for name in SAMPLING if name in options}}
        if not sampled:
            sampling["temperature"] = 0.0
        room = self.max_length - length
        if length < 1 or room < 1:
            raise ValueError(f"{_place(request)}: max_gen_toks ({length}) must lie in 1 … {self.max_length - 1}")
        ids = self.tok_encode(text) or [self.prefix_token_id]
        return self.mixtral.request(id, ids[-room:], length, stop, **sampling), len(ids) > room

    def _fitting(self, context: Sequence[int], continuation: Sequence[int], text: str) -> Pair:
        """A pair that leaves out the context's beginning as needed; ``text`` names the continuation in errors."""
        room = self.max_length + 1 - len(continuation)
        if room < 1 or not continuation:
            size = len(continuation)
            raise ValueError(f"continuation {text[:40]!r} has {size} tokens; it must have 1 … {self.max_length}")
        return tuple(context[-room:]), tuple(continuation)

    def _windows(self, text: str) -> list[Pair]:
        """Context and continuation of each window, so that every token is in just one continuation."""
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
        return [(tuple(context), tuple(own)) for context, own in map(make_disjoint_window, windows)]

    def _parts(self, order: Sequence[int]) -> Iterator[Sequence[int]]:
        """All at once, or in parts where answers are kept, which happens after each part."""
        size = len(order) if self.cache_hook.dbdict is None else SAVED_TOGETHER
        for start in range(0, len(order), max(size, 1)):
            yield order[start : start + size]

    def _check_alike(self, kind: str, requests: Iterable[Instance]) -> None:
        """RuntimeError on every rank unless all were given the same requests; collective."""
        digest = hash_args(kind, [request.args for request in requests])
        if len(set(self.context.all_gather_objects(digest))) > 1:
            raise RuntimeError(
                f"the ranks are left with different {kind} requests: caches (--use_cache) of a stopped run may differ; "
                "copy rank 0's file over the others'"
            )

    def _tell_cut(self, count: int) -> None:
        if count and self.context.is_first:
            logger.warning("%d texts are longer than max_length (%d) and lose their beginning", count, self.max_length)


def _place(request: Instance) -> str:
    return f"task {request.task_name}, document {request.doc_id}"


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be a whole number of at least 1")
    return value


def _batch(batch_size: int | str, max_batch_size: int | None) -> int:
    """Sequences at a time; the command line gives numbers as texts."""
    text = str(batch_size)
    if text.partition(":")[0] == "auto":
        return DEFAULT_BATCH if max_batch_size is None else _whole_number("max_batch_size", max_batch_size)
    return _whole_number("batch_size", int(text) if text.isdigit() else batch_size)


def harness() -> None:
    """The harness's command line. Ranks other than 0 say nothing, but for the error that ends one."""
    if rank_of() == 0:
        return cli_evaluate()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return cli_evaluate()


# By name, so that the harness imports it when it is asked for.
if "mixtralkit" not in model_registry:
    model_registry.register("mixtralkit", target="mixtralkit.evaluation.lm_eval:MixtralLM")


def _until(text: str, request: Instance) -> str:
    """The answer up to stop texts that begin with a space. The harness looks for them in an answer without the space in
    front of its first word, so they do not end generation here."""
    for stop in normalize_gen_kwargs(request.args[1], DEFAULT_GENERATED)["until"]:
        text = text.split(stop)[0] if stop.startswith(" ") else text
    return text
