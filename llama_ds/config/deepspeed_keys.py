"""The keys that DeepSpeed 0.19.8 reads from its JSON and that are set elsewhere, or that it has removed.

DeepSpeed itself ignores unknown keys; a test compares these lists and `deepspeed_effects.USES` with the package.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OWNED = {  # keys that are set elsewhere, and where
    "train_batch_size": "set training.global_batch in the run file",
    "train_micro_batch_size_per_gpu": "set parallel.micro_batch in the run file",
    "gradient_accumulation_steps": "it is global_batch / (dp * micro_batch)",
    "managed_gradient_accumulation": "accumulation is global_batch / (dp * micro_batch)",
    "gradient_clipping": "set optimizer.clip in the run file",
    "gradient_allreduce_op": "gradients are means over the global batch",
    "optimizer": "set optimizer.lr, betas, eps and weight_decay in the run file",
    "scheduler": "set optimizer.schedule, warmup_steps and min_lr_ratio in the run file",
    "steps_per_print": "set logging.interval in the run file",
    "tensorboard": "list it in logging.boards of the run file",
    "csv_monitor": "list csv in logging.boards of the run file",
    "wandb": "list it in logging.boards of the run file",
    "comet": "metrics go to metrics.jsonl in the run's folder",
    "pipeline": "set parallel.pp, partition and recompute in the run file",
    "activation_checkpointing": "set parallel.recompute in the run file",
    "tensor_parallel": "set parallel.tp in the run file",
    "sequence_parallel_size": "set parallel.cp in the run file, which shares rows over ranks",
    "data_parallel_size": "it is world size / (pp * cp * tp)",
    "expert_parallel": "LLaMA has no experts",
    "use_data_before_expert_parallelism": "LLaMA has no experts",
    "checkpoint": "set checkpoint.interval and checkpoint.resume in the run file",
    "datastates_ckpt": "set checkpoint.interval and checkpoint.resume in the run file",
    "data_efficiency": "set data.sources in the run file",
    "dataloader_drop_last": "rows are ordered by (seed, step)",
    "seed": "set seed in the run file",
    "vocabulary_size": "set model.vocab_size in the run file",
    "torch_autocast": 'set bf16.enabled to true or "auto" instead',
    "autotuning": "it starts runs of its own",
    "hybrid_engine": "it is for inference",
    "weight_quantization": "it is for inference",
}
REMOVED = _words(
    "nebula compression_training amp quantize_training sparse_gradients eigenvalue sparse_attention elasticity "
    "graph_harvesting curriculum_learning progressive_layer_drop"
)
REMOVED_ZERO = _words("mics_shard_size mics_hierarchical_params_gather zeropp_loco_param")
