"""Writes small run folders with made-up numbers, in the files' real formats."""

import dataclasses
import json
import pathlib

import numpy as np

from msa_jax.config import AttentionConfig, ModelConfig, MoEConfig, dense_twin
from msa_jax.train.config import DataConfig, ExperimentConfig, ObjectiveConfig

CONFIG = ExperimentConfig(
    model=ModelConfig(d_model=64, num_layers=4, num_full_attention_layers=1, num_dense_layers=1),
    attention=AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=16, rope_dim=8, block_size=16, top_k=4, index_dim=16
    ),
    moe=MoEConfig(num_experts=8, top_k=2, expert_dim=32),
    data=DataConfig(sequence_length=256),
    objective=ObjectiveConfig(index_warmup_steps=40),
)
MSA_LAYERS = [1, 2, 3]
STEPS = 200
WORDS = "def select(blocks, query):\n    return [b for b in blocks if b <= query]\n"


def write_run(folder: pathlib.Path, kind: str, *, config=CONFIG, final_loss=1.75) -> pathlib.Path:
    """One finished run of `kind` "msa" or "gqa"; returns its folder."""
    config = config if kind == "msa" else dense_twin(config)
    rng = np.random.default_rng(len(kind) + round(1000 * final_loss))
    folder.mkdir(parents=True)
    entry = {
        "started": "2026-01-01T00:00:00+00:00",
        "command": ["python", "-m", "experiments.train", "<script>alert(1)</script>"],
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1},
        "packages": {"jax": "0.11.2"},
        "git": {"commit": "abc123", "dirty": False},
        "config": dataclasses.asdict(config),
        "resumed_from_step": None,
    }
    (folder / "manifest.json").write_text(json.dumps({"starts": [entry]}))
    records = [_train_record(step, kind, final_loss, rng) for step in range(5, STEPS + 1, 5)]
    records += [
        _validation_record(step, kind, final_loss, rng) for step in range(20, STEPS + 1, 20)
    ]
    lines = [json.dumps(record) + "\n" for record in sorted(records, key=lambda r: r["step"])]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "evaluation.json").write_text(json.dumps(_evaluation(kind, final_loss, rng)))
    if kind == "msa":
        np.savez(folder / "selection.npz", **_selection(config, rng))
    return folder


def _loss(step, final_loss):
    return final_loss + (5.55 - final_loss) * np.exp(-step / 35)


def _train_record(step, kind, final_loss, rng):
    record = {"step": step, "split": "train", "loss": _loss(step, final_loss) + rng.normal(0, 0.05)}
    record["clock/tokens_per_second"] = 50.0 if step == 5 else 4000.0 + step
    if kind == "msa":
        record["index_kl"] = [0.5 * np.exp(-step / 60) / layer for layer in MSA_LAYERS]
    return record


def _validation_record(step, kind, final_loss, rng):
    record = {"step": step, "split": "validation", "loss": _loss(step, final_loss)}
    if kind == "msa":
        grown = 1 - np.exp(-step / 50)
        record["score_recall"] = (0.93 * grown - rng.uniform(0, 0.1, 3)).tolist()
        record["block_recall"] = (0.74 * grown - rng.uniform(0, 0.1, 3)).tolist()
    return record


def _evaluation(kind, final_loss, rng):
    edges = [0, 16, 32, 64, 128, 256]
    evaluation = {
        "step": STEPS,
        "tokens": 16384,
        "loss": final_loss,
        "bits_per_byte": final_loss / np.log(2),
        "position_edges": edges,
        "loss_by_position": [final_loss + 0.8 * np.exp(-edge / 60) for edge in edges[:-1]],
        "expert_load": rng.dirichlet([6.0] * 8, 3).tolist(),
    }
    if kind == "msa":
        text = WORDS * 8
        evaluation["text"] = [text[16 * block : 16 * block + 16] for block in range(16)]
        evaluation["layers"] = {
            "score_recall": [0.91, 0.92, 0.93],
            "block_recall": [0.71, 0.72, 0.73],
            "index_kl": [0.031, 0.032, 0.033],
        }
    return evaluation


def _selection(config, rng):
    attention = config.attention
    length = config.data.sequence_length
    segments = np.where(np.arange(length) < 160, 1, 2)  # two documents, then 16 tokens of padding
    segments[-16:] = 0
    ids = np.full((len(MSA_LAYERS), attention.num_kv_heads, length, attention.top_k), -1, np.int32)
    for layer, group, query in np.ndindex(ids.shape[:3]):
        if segments[query]:
            own, first = query // 16, 0 if query < 160 else 10
            recent = 1 / (1 + np.arange(own - first))[::-1] ** (1 + group)
            count = min(own - first, attention.top_k - 1)
            earlier = (
                rng.choice(np.arange(first, own), count, replace=False, p=recent / recent.sum())
                if count
                else []
            )
            chosen = sorted([*earlier, own])
            ids[layer, group, query, : len(chosen)] = chosen
    return {"layers": np.array(MSA_LAYERS), "block_ids": ids, "segment_ids": segments}
