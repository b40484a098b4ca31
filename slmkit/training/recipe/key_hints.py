"""Names of recipe keys in other programs, for hints in error messages."""

from __future__ import annotations

# A recipe's key → the names that people type for it.
OTHER_NAMES = {
    "output_dir": "output out out_dir output_path save_dir save_path run_dir run_name logging_dir",
    "seed": "random_seed data_seed manual_seed",
    "objective": "task method mode stage trainer training_type algorithm",
    "model.path": "model_name model_name_or_path model_path model_id base_model checkpoint ckpt ckpt_path pretrained "
    "pretrained_model init_from load_from resume_from_checkpoint from_pretrained",
    "model.preset": "model_size size model_preset config_name",
    "model.model_type": "arch architecture family model_family",
    "model.hidden_size": "n_embd n_embed embed_dim embedding_dim emb_dim d_model dim hidden_dim model_dim width",
    "model.intermediate_size": "d_ff ffn_dim ff_dim n_inner ffn_hidden_size intermediate_dim mlp_dim feedforward_dim",
    "model.num_hidden_layers": "n_layer n_layers num_layers nlayers layers depth n_blocks num_blocks",
    "model.num_attention_heads": "n_head n_heads num_heads nheads heads num_attention_head",
    "model.num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads kv_heads n_query_groups",
    "model.max_position_embeddings": "n_ctx n_positions context context_length context_size ctx_len max_context",
    "model.hidden_dropout": "dropout dropout_rate resid_pdrop embd_pdrop resid_dropout hidden_dropout_prob",
    "model.attention_dropout": "attn_pdrop attn_dropout attention_probs_dropout_prob",
    "model.attention_bias": "bias use_bias qkv_bias",
    "model.hidden_act": "activation activation_function act_fn",
    "model.rms_norm_eps": "norm_eps layer_norm_eps layer_norm_epsilon",
    "model.rope_parameters": "rope_theta rope_base rope_scaling rotary_base",
    "model.tie_word_embeddings": "tie_weights tie_embeddings weight_tying tied",
    "model.initializer_range": "init_std initializer_std",
    "lora.r": "lora_r rank lora_rank lora_dim",
    "lora.lora_alpha": "alpha",
    "lora.target_modules": "lora_target_modules lora_target lora_modules",
    "lora.base_weights": "load_in_4bit load_in_8bit quantization quantize bits qlora bnb_4bit_quant_type",
    "tokenizer.path": "tokenizer_path tokenizer_name tokenizer_name_or_path tokenizer_dir",
    "tokenizer.vocab_size": "vocab_size vocab n_vocab vocabulary_size",
    "tokenizer.chat_template": "template prompt_template chat_format",
    "data.source": "data dataset datasets dataset_name dataset_path data_path data_dir data_file data_files input file "
    "text corpus train_file train_files train_data train_dataset train_path",
    "data.sources": "weight weights mixture mixture_weights sampling_weights interleave_probs",
    "data.text_column": "text_field text_key dataset_text_field column",
    "data.validation": "val_file val_data valid_file validation_file validation_data eval_dataset eval_file test_file",
    "data.validation_fraction": "val_split val_ratio val_size validation_split validation_size eval_split test_size",
    "data.separate_documents": "document_mask attention_reset intra_document_masking",
    "data.shuffle_buffer": "buffer_size shuffle_buffer_size",
    "train.sequence_length": "block_size seq_len seq_length max_len max_length max_seq_len max_seq_length cutoff_len "
    "maxlen sequence_len",
    "train.tokens_per_step": "batch_size global_batch_size train_batch_size total_batch_size batch batch_tokens",
    "train.micro_batch_tokens": "per_device_train_batch_size per_device_batch_size device_batch_size micro_batch_size "
    "mini_batch_size gradient_accumulation_steps gradient_accumulation grad_accum grad_accum_steps "
    "accumulate_grad_batches",
    "train.max_tokens": "tokens train_tokens num_tokens total_tokens max_train_tokens token_budget",
    "train.max_steps": "steps n_steps num_steps iters max_iters n_iters num_iters max_iterations iterations "
    "num_train_steps train_steps training_steps total_steps",
    "train.num_train_epochs": "epoch epochs n_epochs num_epochs max_epochs",
    "train.optimizer": "optim optimiser optimizer_name optimizer_type",
    "train.learning_rate": "lr max_lr peak_lr base_lr initial_lr",
    "train.min_learning_rate_ratio": "min_lr min_lr_ratio min_lr_rate end_lr final_lr",
    "train.lr_scheduler_type": "scheduler lr_scheduler schedule lr_schedule lr_decay_style scheduler_type decay",
    "train.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "train.warmup_ratio": "warmup_fraction warmup_pct",
    "train.weight_decay": "wd l2",
    "train.adam_beta1": "beta1 betas",
    "train.adam_beta2": "beta2",
    "train.adam_epsilon": "eps epsilon adam_eps",
    "train.muon_momentum": "momentum",
    "train.max_grad_norm": "grad_clip clip clip_grad clip_norm max_norm grad_norm_clip gradient_clip gradient_clipping "
    "gradient_clip_norm gradient_clip_val clip_grad_norm",
    "train.gradient_checkpointing": "grad_checkpoint grad_checkpointing activation_checkpointing recompute",
    "train.compile": "torch_compile use_compile",
    "train.precision": "bf16 fp16 fp32 tf32 bfloat16 float16 half amp mixed_precision dtype torch_dtype",
    "train.device": "gpu gpus cuda accelerator device_map",
    "train.parallel": "fsdp ddp strategy deepspeed zero_stage",
    "train.logging_steps": "log_interval log_every log_freq logging_interval print_every",
    "train.eval_steps": "eval_interval eval_every eval_freq evaluation_steps val_interval validate_every",
    "train.save_steps": "save_interval save_every save_freq checkpoint_interval checkpoint_every ckpt_interval",
    "train.save_total_limit": "keep_last max_checkpoints keep_checkpoints",
    "train.report_to": "wandb tensorboard logger use_wandb tracker",
    "distillation.teacher": "teacher teacher_model teacher_path",
    "grpo.reward": "reward_fn reward_func reward_funcs reward_function",
    "grpo.num_generations": "group_size n_samples num_samples",
    "preference.loss": "loss_type dpo_loss",
    "kto.beta": "kto_beta",
    "kto.desirable_weight": "kto_chosen_weight chosen_weight",
    "kto.undesirable_weight": "kto_rejected_weight rejected_weight",
}
HINTS = {name: key for key, names in OTHER_NAMES.items() for name in names.split()}
# Keys whose unit differs from that of the other name.
NOTES = {
    "data.sources": "a list: '[{path: a.txt, weight: 2}, {path: b.txt, weight: 1}]'",
    "train.tokens_per_step": "counted in tokens: rows × sequence length",
    "train.micro_batch_tokens": "tokens that go through the model at once; how often is accumulated follows from it",
    "train.min_learning_rate_ratio": "a share of learning_rate",
    "train.precision": "float32, bfloat16 or float16",
    "train.device": "cpu, cuda or mps",
    "train.parallel": "ddp or fsdp",
}
HINTS |= {name: f"{key} ({NOTES[key]})" for name, key in HINTS.items() if key in NOTES}
