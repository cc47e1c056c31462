"""The keys of a DeepSpeed JSON that DeepSpeed 0.19.8 reads (runtime/config.py, constants.py, zero/config.py).

DeepSpeed itself ignores unknown keys; a test compares these lists with the installed package.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


USER_KEYS = _words(
    "zero_optimization bf16 fp16 data_types communication_data_type seq_parallel_communication_data_type "
    "prescale_gradients gradient_predivide_factor disable_allgather zero_allow_untested_optimizer "
    "zero_force_ds_cpu_optimizer aio compile wall_clock_breakdown memory_breakdown timers flops_profiler "
    "comms_logger dump_state disable_python_gc log_level"
)
SECTION_KEYS = {
    "zero_optimization": _words(
        "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
        "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
        "elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size prefetch_bucket_size "
        "param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance "
        "gather_16bit_weights_on_model_save module_granularity_threshold use_all_reduce_for_fetch_params "
        "allgather_sequential stage3_prefetch_bucket_size stage3_param_persistence_threshold "
        "stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance "
        "stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
        "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters "
        "legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size zero_quantized_weights "
        "zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear "
        "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
        "save_muon_momentum_buffer_in_memory leaf_module"
    ),
    "bf16": _words(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "data_types": _words("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
}
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
    "tensorboard": "set logging.tensorboard in the run file",
    "csv_monitor": "metrics go to metrics.jsonl in the run's folder",
    "wandb": "metrics go to metrics.jsonl in the run's folder",
    "comet": "metrics go to metrics.jsonl in the run's folder",
    "pipeline": "set parallel.pp, partition and recompute in the run file",
    "activation_checkpointing": "set parallel.recompute in the run file",
    "tensor_parallel": "set parallel.tp in the run file",
    "sequence_parallel_size": "set parallel.sequence_parallel in the run file",
    "data_parallel_size": "it is world size / (pp * tp)",
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
