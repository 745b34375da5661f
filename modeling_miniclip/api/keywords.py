"""Keyword arguments of `train`, written by `make docs` from the training flags: do not edit."""

from os import PathLike
from typing import Any, Literal, TypedDict


class TrainingKeywords(TypedDict, total=False):
    """The training flags; one that is left out, or None, has its default."""

    # Data

    recipe: str | PathLike[str] | None
    """YAML file of flags, or the name of one in configuration/recipes (scenes, if you pass no dataset either)"""

    dataset_weights: float | list[float] | None
    """with several datasets: the share of each in an epoch, relative to the others; in a recipe, dataset may be a
    mapping of datasets to weights (each image once per epoch)"""

    zero_shot_dataset: str | PathLike[str] | None
    """folder of class folders that each validation classifies by their names: zero_shot_top-1 and -5"""

    retention_dataset: str | PathLike[str] | None
    """with model_name_or_path: a dataset that must not be forgotten; each validation also measures recall on its
    validation split"""

    image_dir: str | PathLike[str] | None
    """folder of the images that a CSV file names (next to the CSV file, or its subfolder Images)"""

    allow_outside_images: bool | None
    """allow a CSV file to name images outside its image folder: by '..', an absolute path or a symbolic link
    (False)"""

    image_column: str | None
    """column with the image or its file name (image)"""

    caption_column: str | None
    """column with the caption, or the common part of caption_0, caption_1, ... (caption)"""

    caption_template: str | None
    """caption of the images in a folder of a class; {} stands for the name of the folder (a photo of a {})"""

    dataset_cache_dir: str | PathLike[str] | None
    """folder of tables of captions and places of images, shared between runs (HF_HOME/miniclip/datasets)"""

    shard_cache_gb: float | None
    """gigabytes of fetched shards to keep; of more, those used least recently are removed (100.0)"""

    dataset_revision: str | None
    """commit, branch or tag of a Hub dataset"""

    stream_first_rows: int | None
    """stream only the first N rows of each split of a Hub dataset, without downloading the rest"""

    validation_fraction: float | None
    """fraction of the images used for validation if the dataset has no validation split (0.1)"""

    max_train_images: int | None
    """use only the first N training images"""

    max_validation_images: int | None
    """validate on N images, drawn by the seed, if the split has more; 0 for all of them (5000)"""

    max_bad_image_fraction: float | None
    """largest fraction of a split's images that may fail to decode: up to it, each is reported and skipped; above it,
    the run ends; 0 ends it at the first one (0.01)"""

    num_workers: int | None
    """processes that decode and augment images; with 0, the training process does this itself (2)"""

    # Model

    vision_model: str | PathLike[str] | None
    """pretrained image tower: timm name, or repository or folder of a timm model or of an image encoder of
    transformers (resnet50.a1_in1k)"""

    text_model: str | PathLike[str] | None
    """pretrained text tower: Hub name or folder of a text encoder (distilbert-base-uncased)"""

    preset: str | PathLike[str] | None
    """train from random weights: JSON file of a MiniClipConfig, or the name of one in configuration/presets; also
    trains a WordPiece vocabulary on the captions"""

    model_name_or_path: str | PathLike[str] | None
    """start from a trained model: folder or Hub repository of an export, or of a CLIP of another library"""

    text_pooling: Literal["cls", "mean", "last", "eos", "pooler"] | None
    """how the token states of a text become one vector: the first of them, their mean, the last, that of the end
    token, or the tower's own pooled output (what the text tower's repository declares; otherwise last for a decoder
    such as GPT-2, pooler for SigLIP's tower, and cls for any other)"""

    projection_dim: int | None
    """dimensions of the shared embedding space (derived)"""

    projection_depth: int | None
    """linear layers in each projection head; 1 is a plain projection, 0 none (2)"""

    loss_type: Literal["softmax_sum", "softmax_mean", "sigmoid"] | None
    """softmax is CLIP's loss; it combines the captions of an image as the log of their summed probability (sum) or the
    mean of their log-probabilities (mean); sigmoid is SigLIP's loss (softmax_sum)"""

    dropout: float | None
    """dropout of heads and towers (0.1 in the heads, each tower's own setting in the towers)"""

    projection_dropout: float | None
    """dropout of the projection heads only; overrides dropout (derived)"""

    image_size: int | None
    """image height and width in pixels (derived)"""

    train_image_size: int | None
    """height and width of augmented training images; a smaller size trains faster and makes up for random crops, which
    enlarge objects (derived)"""

    crop_pct: float | None
    """fraction of the shorter edge kept by the centre crop; 1 keeps all of it (derived)"""

    max_length: int | None
    """longest caption in tokens (the text tower's limit)"""

    freeze: Literal["none", "vision", "text", "both"] | None
    """which towers to freeze (derived)"""

    frozen_vision_fraction: float | None
    """fraction of the image tower's layers to freeze, counted from the pixels (derived)"""

    frozen_text_fraction: float | None
    """fraction of the text tower's layers to freeze, counted from the embeddings (0.0)"""

    num_views: int | None
    """with a frozen image tower: augmented views of each training image whose features are computed once, instead of
    augmenting in every epoch"""

    feature_cache_dir: str | PathLike[str] | None
    """folder of cached features of frozen towers, shared between runs (HF_HOME/miniclip/features)"""

    lora_rank: int | None
    """train adapters of this rank in the towers instead of their weights (LoRA, needs PEFT); the export is a plain
    model; --freeze vision or text leaves a tower without adapters (off)"""

    lora_kwargs: str | dict[str, Any] | None
    """details of the adapters as JSON or YAML: {alpha: 16, dropout: 0, targets: [q_proj, v_proj]}: what they add is
    multiplied by alpha / rank (2); their dropout (0); the ends of the names of the layers that get one (all linear
    layers of a tower, or its convolutions if these have more weights)"""

    freeze_batch_norm: bool | None
    """freeze the image tower's batch-norm statistics (true for pretrained towers, false for a preset)"""

    # Optimization

    batch_size: int | None
    """images per optimizer step, summed over all processes (derived)"""

    shuffle: Literal["full", "window"] | None
    """order of the training images in each epoch: any order, or shards in any order and images within a window of some
    shards, so that shards are read one after the other (window for Parquet files and remote shards, otherwise full)"""

    chunk_size: int | None
    """images that a process computes at a time, at least 2; a larger batch is computed in chunks, which gives the same
    gradients with less memory but computes each chunk twice (the whole batch, or what fits into memory)"""

    captions_per_image: int | None
    """captions drawn for each image of a batch (derived)"""

    hard_negatives: str | list[str] | None
    """wrong captions that each image must rank below its own: none, column (negative_captions of the dataset), or
    swap: its captions with adjectives, nouns or relations swapped (English); these three words choose kinds (column if
    the dataset has it, otherwise none)"""

    matryoshka_dims: str | list[str] | list[int] | None
    """lengths, such as 64,128,256, of short embeddings that are trained, too: the first dimensions of an embedding,
    normalised again; the full length is always one of them (those of model_name_or_path, otherwise off)"""

    teacher: str | PathLike[str] | None
    """learn another CLIP's similarities of the images and captions of a batch, too: folder or Hub repository of an
    export, or of a CLIP of another library; its towers run once over the training images (none)"""

    teacher_kwargs: str | dict[str, Any] | None
    """details of the teacher as JSON or YAML: {weight: 1, temperature: 0.01}; weight of this loss, that of the
    contrastive one being 1, and the temperature of the teacher's similarities (its own)"""

    num_train_epochs: int | None
    """passes over the training images (derived)"""

    max_steps: int | None
    """stop after N optimizer steps"""

    time_limit: str | None
    """as many steps as fit into a time such as 90s, 20m or 1.5h, from the start of the command to its end; overrides
    the epochs, steps and warm-up of a recipe"""

    learning_rate: float | None
    """learning rate of all parts; on the command line, overrides the rates of a recipe; the next three flags override
    it for one part"""

    head_learning_rate: float | None
    """learning rate of the projection heads and the temperature (derived)"""

    vision_learning_rate: float | None
    """learning rate of the image tower (derived)"""

    text_learning_rate: float | None
    """learning rate of the text tower (derived)"""

    layer_decay: float | None
    """layer-wise learning-rate decay: each layer's rate is this factor times that of the next layer (derived)"""

    weight_decay: float | None
    """AdamW weight decay, applied to weight matrices only (derived)"""

    max_grad_norm: float | None
    """clip gradients to this norm (1.0)"""

    lr_scheduler_type: Literal["plateau", "cosine"] | None
    """plateau: lower the rates when the validation loss stops falling; cosine: warm up, then decay to 0 (derived)"""

    lr_scheduler_kwargs: str | dict[str, Any] | None
    """details of the schedule as JSON or YAML: {patience: 1, factor: 0.8} of plateau, the validations without
    improvement after which the rates are multiplied by the factor; {hold_steps: 0} of cosine, the steps at the full
    rates between warm-up and decay"""

    warmup_steps: int | None
    """cosine: steps of linear warm-up (derived)"""

    ema_decay: float | None
    """validate and export an exponential moving average of the weights with this decay, such as 0.999; 0 is off
    (derived)"""

    augmentation: str | list[dict[str, Any]] | None
    """albumentations transforms for training images: list of {name, arguments} as JSON or YAML, [] for none (derived;
    none for a frozen image tower, which then runs only once)"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None
    """precision of the forward pass (bf16 if the accelerator supports it, otherwise no)"""

    compile_towers: bool | None
    """compile the towers with torch.compile: takes minutes at the start, then steps are faster on a GPU; rarely pays
    off on a CPU (False)"""

    blend: str | float | None
    """at the end, move the weights of the best model back towards those of model_name_or_path: the share of the best
    model that is kept, such as 0.5, or auto, which validates 0, 0.1, ... 1 and takes the best (off)"""

    seed: int | None
    """random seed for weights, batches, captions, augmentation and dropout (0)"""

    overfit_batch: bool | None
    """check that the model can learn: train on the first batch only, without augmentation and dropout, for up to
    max_steps (300) steps, and report whether the loss reaches zero; writes nothing (False)"""

    overwrite_output_dir: bool | None
    """delete an earlier run in output_dir (False)"""

    resume_from_checkpoint: str | PathLike[str] | None
    """'latest' (from scratch if there is none yet), or a folder in output_dir/checkpoints"""

    discard_later_checkpoints: bool | None
    """delete the checkpoints after the one in resume_from_checkpoint (False)"""

    checkpointing_steps: str | int | None
    """steps between checkpoints, or 'epoch' for one after each epoch (epoch)"""

    save_total_limit: int | None
    """number of checkpoints to keep; the last and the best are always kept (2)"""

    eval_steps: int | None
    """validate every N steps, in addition to the end of each epoch (off)"""

    best_metric: str | None
    """validation metric that selects the exported model (derived)"""

    early_stopping_patience: int | None
    """stop after N validations in which best_metric did not improve"""

    logging_steps: int | None
    """steps between lines of metrics.jsonl (10)"""

    report_to: Literal["none", "tensorboard", "wandb", "trackio", "all"] | None
    """experiment tracker (none)"""

    push_to_hub: bool | None
    """upload the export to the Hub (see hub_strategy) (False)"""

    hub_strategy: Literal["end", "every_save"] | None
    """with push_to_hub: upload once at the end, or also each time a new best model is exported (end)"""

    hub_model_id: str | None
    """Hub repository to upload to (your account, named like output_dir)"""

    hub_private_repo: bool | None
    """create the repository as private; reject an existing public one (False)"""

    hub_revision: str | None
    """branch to upload to; created if it does not exist (main)"""

    hub_license: str | None
    """license in the model card: a Hub identifier such as mit (that of the model it starts from, or unknown)"""
