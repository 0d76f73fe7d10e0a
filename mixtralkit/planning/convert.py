"""A plan or a record of routing in one system's format, written in another's."""

from __future__ import annotations

from pathlib import Path

from mixtralkit.planning.formats import load_plan, save_plan
from mixtralkit.whole_file import check_free


def convert_plan(
    source: Path,
    output: Path,
    format: str = "plan",
    from_format: str | None = None,
    num_experts: int | None = None,
    world_size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the expert plan in SOURCE, of any format, to OUTPUT.

    Args:
        source: plan.json, SGLang's physical_to_logical_map (.json or .pt), TensorRT-LLM's YAML, vLLM-Ascend's expert
            map or ExFlow's CSV; found by looking.
        output: file to write.
        format: plan, sglang, tensorrt, vllm-ascend or exflow.
        from_format: what SOURCE must be; left out, it is recognised.
        num_experts: experts of a layer, for a source that does not say (ExFlow's).
        world_size: ranks, for a source that does not say (SGLang's, TensorRT-LLM's).
        overwrite: replace OUTPUT where it exists.
    """
    check_free(output, overwrite)
    plan = load_plan(source, from_format, num_experts=num_experts, world_size=world_size)
    save_plan(plan, output, format)
    print(
        f"{output}: {format}, {plan.num_layers} layers, {plan.num_experts} experts on {plan.world_size} ranks, "
        f"at most {plan.slots_LWS.shape[2]} slots each"
    )
