"""Our measurements in the names and units of other engines' benchmarks, so that their results compare line by line."""

from __future__ import annotations


def peer_fields(
    count: int, prompt_len: int, new_tokens: int, first_s: float, step_s: float | None, whole_s: float
) -> dict[str, dict[str, float]]:
    """A measurement as vLLM's ``bench serve`` and SGLang's ``bench_one_batch`` and ``bench_one_batch_server`` name it.

    Args:
        count, prompt_len, new_tokens: sequences, and tokens of each.
        first_s: seconds until all have their first token.
        step_s: seconds of a decode step; None where only prompts were run.
        whole_s: seconds until all have all their tokens.
    """
    prompt_tokens, answer_tokens = count * prompt_len, count * new_tokens
    vllm = {
        "completed": count, "total_input_tokens": prompt_tokens, "total_output_tokens": answer_tokens,
        "duration": whole_s, "request_throughput": count / whole_s, "output_throughput": answer_tokens / whole_s,
        "total_token_throughput": (prompt_tokens + answer_tokens) / whole_s,
        "mean_ttft_ms": 1e3 * first_s, "median_ttft_ms": 1e3 * first_s,
    }  # fmt: skip
    sglang = {
        "batch_size": count, "input_len": prompt_len, "output_len": new_tokens, "latency": whole_s,
        "prefill_latency": first_s, "prefill_throughput": prompt_tokens / first_s, "last_ttft": first_s,
        "input_throughput": prompt_tokens / first_s, "total_latency": whole_s,
        "overall_throughput": (prompt_tokens + answer_tokens) / whole_s,
    }  # fmt: skip
    if step_s is not None:
        vllm |= {"mean_tpot_ms": 1e3 * step_s, "median_tpot_ms": 1e3 * step_s}
        sglang |= {"median_decode_latency": step_s, "median_decode_throughput": count / step_s,
                   "output_throughput": answer_tokens / (whole_s - first_s)}  # fmt: skip
    return {
        peer: {name: round(value, 5) for name, value in fields.items()}
        for peer, fields in (("vllm", vllm), ("sglang", sglang))
    }
