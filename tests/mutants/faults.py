"""The faults: one small change of the package each, and the fast tests that must fail because of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A change that a test must notice.

    Args:
        what: the mistake, in a few words.
        file: path of the changed file, from the root of the checkout.
        old: text that occurs exactly once in this file.
        new: text that replaces it.
        tests: arguments of pytest that select the tests, of which at least one must fail.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PACKAGE = "modeling_miniclip"
CAPTIONS, LOADER, CHECK, SCENES = (f"tests/data/test_{name}.py" for name in ("captions", "loader", "check", "scenes"))
BATCHES = "tests/data/test_batches.py"
ENCODE = "tests/inference/test_encode.py"
METRICS, ZERO_SHOT, EVALUATE = (f"tests/evaluation/test_{name}.py" for name in ("metrics", "zero_shot", "evaluate"))
EXPORT, FUZZ_EXPORTS = "tests/hub/test_export.py", "tests/hub/test_fuzz_exports.py"
NEAREST, QUERY, UPDATE, SHORT = (
    f"tests/search/test_{name}.py" for name in ("nearest", "query", "update", "short_embeddings")
)
HTML, MATCH_GRID, FILES, RESOURCES = (
    f"tests/utils/test_{name}.py" for name in ("html", "match_grid", "files", "resources")
)
LAYERS, OPTIMIZER, EMA, GRAD_CACHE, DISTRIBUTED, CHECKPOINTS, DIAGNOSTICS, FOLD, FEATURES, BAD_IMAGES = (
    f"tests/training/test_{name}.py"
    for name in (
        "layers",
        "optimizer",
        "ema",
        "grad_cache",
        "distributed",
        "checkpoints",
        "diagnostics",
        "fold_batch_norm",
        "features",
        "bad_images",
    )
)
FROM_CLIP, BACK, CLIP_COMMANDS = (f"tests/clips/test_{name}.py" for name in ("from_transformers", "back", "commands"))
GLOBAL_LOSS, TEACHER = "tests/training/test_global_loss.py", "tests/training/test_teacher.py"
LORA, BLEND, IMAGE_SIZE = (f"tests/training/test_{name}.py" for name in ("lora", "blend", "image_size"))
LOSS, MODEL, PROCESSOR, UNTRUSTED = (f"tests/test_{name}.py" for name in ("loss", "model", "processor", "untrusted"))
ENCODERS = "tests/test_image_encoders.py"
TRAINER, CLEAN_PROCESS, RESULT = (f"tests/api/test_{name}.py" for name in ("trainer", "clean_process", "result"))


def faults_in(folder: str, *faults: tuple[str, str, str, str, str]) -> list[Fault]:
    """Faults of one folder, from `(file, what, old, new, tests)`; `tests` is split at spaces."""
    prefix = f"{folder}/" if folder else ""
    return [Fault(what, f"{prefix}{file}", old, new, tuple(tests.split())) for file, what, old, new, tests in faults]


FAULTS = [
    *faults_in(
        f"{PACKAGE}/data",
        (
            "loading/pairs.py",
            "rows without further keys are pairs",
            "text_keys == NO_KEY, NO_KEY - 1",
            "text_keys == NO_KEY, NO_KEY",
            GLOBAL_LOSS,
        ),
        (
            "source_kinds.py",
            "a source alone is taken apart into its letters",
            "([sources] if isinstance(sources, str | os.PathLike) else sources)",
            "sources",
            f"tests/data/test_same_rows.py {UPDATE}",
        ),
        (
            "tables/table_cache.py",
            "half-written tables stay",
            "shutil.rmtree(fresh, ignore_errors=True)",
            "pass",
            "tests/data/test_table_cache.py",
        ),
        (
            "tables/assign_splits.py",
            "a small split may stay empty",
            "sizes, wanted)) + 1), units - 1)",
            "sizes, wanted)) + 1), units)",
            "tests/data/test_assign_splits.py",
        ),
        (
            "tables/assign_splits.py",
            "the split ignores its seed",
            "drawn = np.random.default_rng(seed)",
            "drawn = np.random.default_rng(0)",
            CAPTIONS,
        ),
        (
            "splits.py",
            "a subject called train is a split",
            "if all(map(_split_folder, names))",
            "if any(map(_split_folder, names))",
            "tests/data/readers/test_image_folder.py",
        ),
        (
            "readers/image_files.py",
            "the images of later blocks are not looked for",
            "other = images.check(block)",
            "other = images.check(block) if not images.blocks else {}",
            "tests/data/readers/test_caption_file.py",
        ),
        (
            "splits.py",
            "a folder called train next to one called boat is a split",
            "all(map(_split_folder, names))",
            "any(map(_split_folder, names))",
            "tests/data/readers/test_image_folder.py",
        ),
        (
            "readers/caption_file.py",
            "row numbers are one too low",
            "number, end = end + 1, before",
            "number, end = end, before",
            CAPTIONS,
        ),
        (
            "readers/caption_file.py",
            "an open quotation mark swallows rows",
            "skipinitialspace=True, strict=True",
            "skipinitialspace=True, strict=False",
            CAPTIONS,
        ),
        (
            "readers/image_files.py",
            "a folder with the same prefix counts as inside",
            'real.startswith(os.path.join(root, ""))',
            "real.startswith(root)",
            UNTRUSTED,
        ),
        (
            "checking/near_duplicates.py",
            "similar hashes suffice",
            "<= MOST_SIGNS and",
            "<= MOST_SIGNS or",
            CHECK,
        ),
        (
            "loading/dataset.py",
            "every epoch draws the same captions",
            "default_rng([self.seed, key[0], _index_of(key[1])])",
            "default_rng([self.seed, _index_of(key[1])])",
            LOADER,
        ),
        ("loading/dataset.py", "a caption may be drawn twice", "replace=False)", "replace=True)", LOADER),
        (
            "loading/dataset.py",
            "every epoch gets the first view",
            "self.vision_features[epoch % len(self.vision_features)]",
            "self.vision_features[0]",
            f"{LOADER} {FEATURES}",
        ),
        (
            "loading/reduced_size.py",
            "a crop may be smaller than its result",
            "crop.scale[0] * min(",
            "crop.scale[1] * min(",
            "tests/data/test_reduced_size.py",
        ),
        (
            "loading/dataset.py",
            "a teacher embeds other captions than those drawn",
            "self.taught.texts[index][torch.from_numpy(chosen)]",
            "self.taught.texts[index][: len(chosen)]",
            TEACHER,
        ),
        (
            "loading/order.py",
            "every epoch has the same order",
            "default_rng([self.seed, epoch, self.number])",
            "default_rng([self.seed, 0, self.number])",
            BATCHES,
        ),
        (
            "loading/batches.py",
            "a resumed epoch skips a batch",
            "(self.epoch, self.first_batch * self.batch_size",
            "(self.epoch, (self.first_batch + 1) * self.batch_size",
            BATCHES,
        ),
        (
            "loading/batches.py",
            "the short last batch is not counted",
            "return -(-self.order.num_rows // self.batch_size)",
            "return (self.order.num_rows // self.batch_size)",
            BATCHES,
        ),
        (
            "loading/batches.py",
            "processes share rows",
            "batch[self.rank :: self.world_size]",
            "batch[self.rank :]",
            BATCHES,
        ),
        (
            "loading/order.py",
            "a resumed window starts again",
            "rows[max(0, start - ",
            "rows[max(0, 0 * start - ",
            BATCHES,
        ),
        (
            "loading/mixing.py",
            "a set starts again in each epoch",
            "first_use = epoch * self.shares[number] + int(use[mine][0])",
            "first_use = int(use[mine][0])",
            BATCHES,
        ),
        (
            "loading/mixing.py",
            "a set that runs out keeps its order",
            "self.orders[number].pieces(each, place)",
            "self.orders[number].pieces(0 * each, place)",
            BATCHES,
        ),
        (
            "shards/split_shards.py",
            "row groups are one shard",
            'int(starts.searchsorted(place.start, "right"))',
            "0",
            BATCHES,
        ),
        ("scenes.py", "left and right are swapped", "_NEAR, _FAR = 0.26, 0.74", "_NEAR, _FAR = 0.74, 0.26", SCENES),
    ),
    *faults_in(
        f"{PACKAGE}/inference",
        (
            "encode.py",
            "encoding leaves the model in evaluation mode",
            "module.training = training",
            "module.training = False",
            ENCODE,
        ),
        (
            "encode.py",
            "a short embedding is not normalised again",
            "normalize(embeddings[..., :dim].float(), dim=-1)",
            "embeddings[..., :dim].float()",
            ENCODE,
        ),
        (
            "loading.py",
            "the text side loads the image head",
            '"text": ("text_model", "text_projection")',
            '"text": ("text_model", "visual_projection")',
            QUERY,
        ),
    ),
    *faults_in(
        f"{PACKAGE}/evaluation",
        ("metrics.py", "ranks begin at 0", "rank = torch.ones(len(block)", "rank = torch.zeros(len(block)", METRICS),
        (
            "metrics.py",
            "ties count for the model",
            "before = ~(similarity < best)",
            "before = similarity > best",
            METRICS,
        ),
        (
            "metrics.py",
            "keys of later blocks get the wrong number",
            "found.indices + part.start",
            "found.indices + columns[0].start",
            EVALUATE,
        ),
        ("metrics.py", "recall at K counts K - 1", "100 * (rank <= k)", "100 * (rank < k)", METRICS),
        (
            "metrics.py",
            "image-to-text ranks the images of texts",
            '"image_to_text": ranks(image_embeds, text_embeds, image_id, text_image_id)',
            '"image_to_text": ranks(text_embeds, image_embeds, text_image_id, image_id)',
            METRICS,
        ),
        (
            "metrics.py",
            "the larger loss is better",
            "return value < best if smaller_is_better",
            "return value > best if smaller_is_better",
            METRICS,
        ),
        ("metrics.py", "the interval covers 90 %", "[0.025, 0.975]", "[0.05, 0.95]", METRICS),
        (
            "zero_shot.py",
            "classes and templates are swapped",
            ".view(len(sentences), len(sentences[0]), -1).mean(dim=1)",
            ".view(len(sentences[0]), len(sentences), -1).mean(dim=0)",
            ZERO_SHOT,
        ),
        (
            "zero_shot.py",
            "the mean of sentences is not normalised",
            "return torch.nn.functional.normalize(per_class, dim=-1)",
            "return per_class",
            ZERO_SHOT,
        ),
        (
            "failure_page.py",
            "right answers are listed as failures",
            "data.image_of_query(direction), rank > 1)",
            "data.image_of_query(direction), rank >= 1)",
            "tests/evaluation/test_failure_page.py",
        ),
    ),
    *faults_in(
        f"{PACKAGE}/clips",
        (
            "families.py",
            "CLIP's text is pooled as a mean",
            'Family("CLIPModel", "eos")',
            'Family("CLIPModel", "mean")',
            FROM_CLIP,
        ),
        ("families.py", "SigLIP 2's patches are turned", "permute(0, 3, 1, 2)", "permute(0, 3, 2, 1)", FROM_CLIP),
        (
            "families.py",
            "a dual encoder takes the class token",
            '"VisionTextDualEncoderModel", "pooler"',
            '"VisionTextDualEncoderModel", "cls"',
            FROM_CLIP,
        ),
        (
            "preprocessing.py",
            "pixels that differ a little are not noticed",
            "LARGEST_DIFFERENCE = 1e-5",
            "LARGEST_DIFFERENCE = 1e-1",
            FROM_CLIP,
        ),
        (
            "to_transformers.py",
            "two-layer heads are not noticed",
            "if parts.keys() != (",
            "if parts.keys() < (",
            BACK,
        ),
        (
            "exported.py",
            "a changed CLIP keeps its conversion",
            "files = _states(sorted(Path(source.name).iterdir()))",
            "files = []",
            CLIP_COMMANDS,
        ),
    ),
    *faults_in(
        f"{PACKAGE}/hub",
        (
            "model_card.py",
            "HTML in a name is not escaped",
            r'r"([\\`*\[\]<>|])"',
            r'r"([\\`*\[\]|])"',
            UNTRUSTED,
        ),
        ("model_card.py", "a backtick ends the code of a card", '.replace("`", "\'")', "", UNTRUSTED),
        (
            "export.py",
            "local paths stay in the configuration",
            "if not is_hub_id(config.name_or_path)",
            "if is_hub_id(config.name_or_path)",
            EXPORT,
        ),
    ),
    *faults_in(
        f"{PACKAGE}/training",
        (
            "finetune/lora.py",
            "the scale of adapters is not merged",
            "change = layer.scaling[ADAPTER] * (up @ down)",
            "change = up @ down",
            LORA,
        ),
        (
            "finetune/lora.py",
            "layers that are not called get adapters",
            "if name in called}",
            "if name in layers}",
            LORA,
        ),
        (
            "finetune/blend.py",
            "a share is that of the model before training",
            "torch.lerp(before[name], tensor, share)",
            "torch.lerp(tensor, before[name], share)",
            BLEND,
        ),
        (
            "finetune/blend.py",
            "the largest loss is the best one",
            "best / value if smaller_is_better else value / best",
            "value / best",
            BLEND,
        ),
        (
            "towers/image_size.py",
            "the positions of other tokens are those of patches",
            "others = positions - old**2",
            "others = 0",
            IMAGE_SIZE,
        ),
        ("towers/layers.py", "all layers may be frozen", "len(layers) - 1)]:", "len(layers))]:", LAYERS),
        (
            "towers/layers.py",
            "the first layer learns fastest",
            "decay ** (len(layers) - 1 - i)",
            "decay**i",
            LAYERS,
        ),
        ("optimizer.py", "biases decay", "decays = parameter.ndim > 1", "decays = parameter.ndim >= 1", OPTIMIZER),
        (
            "optimizer.py",
            "warm-up begins with rate 0",
            "return (step + 1) / warm_up",
            "return step / warm_up",
            OPTIMIZER,
        ),
        ("optimizer.py", "the cosine rises", "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(", OPTIMIZER),
        (
            "optimizer.py",
            "the temperature's bound is not a logarithm",
            "(model.logit_scale, math.log(model.config.logit_scale_max))",
            "(model.logit_scale, model.config.logit_scale_max)",
            OPTIMIZER,
        ),
        (
            "ema.py",
            "the average warms up too slowly",
            "(1 + self.steps) / (10 + self.steps)",
            "self.steps / (10 + self.steps)",
            EMA,
        ),
        (
            "grad_cache.py",
            "every chunk gets the gradient of the first",
            "gradients[name][start[name] : end]",
            "gradients[name][: end - start[name]]",
            GRAD_CACHE,
        ),
        (
            "grad_cache.py",
            "dropout draws other masks in the second pass",
            "torch.set_rng_state(state[0])",
            "pass",
            GRAD_CACHE,
        ),
        (
            "grad_cache.py",
            "the loss keeps its graph",
            "return loss.detach()",
            "return loss",
            GRAD_CACHE,
        ),
        (
            "grad_cache.py",
            "batch norm counts each chunk twice",
            "norm.track_running_stats = False",
            "norm.track_running_stats = True",
            GRAD_CACHE,
        ),
        (
            "processes/distributed.py",
            "gradients go to the next process",
            "start = sum(counts[:rank])",
            "start = sum(counts[: rank + 1])",
            DISTRIBUTED,
        ),
        (
            "processes/distributed.py",
            "gradients of other processes are dropped",
            "dist.all_reduce(gradient)",
            "gradient",
            DISTRIBUTED,
        ),
        (
            "loss/objectives.py",
            "the teacher's sums are those of one process",
            "whole = logsumexp_over_processes(self.teacher)",
            "whole = self.teacher",
            GLOBAL_LOSS,
        ),
        (
            "towers/teacher.py",
            "a teacher's temperature is taken for its inverse",
            "processor, 1 / temperature, details",
            "processor, temperature, details",
            TEACHER,
        ),
        (
            "loss/tiles.py",
            "negatives are queries",
            "rows.start >= self.negatives[0].start",
            "rows.start > self.negatives[0].start",
            GLOBAL_LOSS,
        ),
        (
            "resuming/checkpoints.py",
            "one checkpoint too many is deleted",
            "max(0, len(paths) - keep)",
            "max(0, len(paths) - keep + 1)",
            CHECKPOINTS,
        ),
        (
            "resuming/checkpoints.py",
            "rewinding deletes the checkpoint itself",
            "if path.name > checkpoint.name:",
            "if path.name >= checkpoint.name:",
            CHECKPOINTS,
        ),
        (
            "reports/diagnostics.py",
            "the chance loss has a wrong sign",
            "of_wrong = wrong * math.log(",
            "of_wrong = -wrong * math.log(",
            DIAGNOSTICS,
        ),
        (
            "reports/diagnostics.py",
            "the mean cosine counts rows with themselves",
            "return (total - n) / (n * (n - 1))",
            "return total / (n * n)",
            DIAGNOSTICS,
        ),
        (
            "towers/fold_batch_norm.py",
            "mean and variance are swapped",
            "(norm.running_mean, norm.running_var,",
            "(norm.running_var, norm.running_mean,",
            FOLD,
        ),
        (
            "towers/feature_cache.py",
            "a hash ignores where parts end",
            'whole.update(len(part).to_bytes(8, "little"))',
            "pass",
            FEATURES,
        ),
        (
            "resuming/fingerprint_rows.py",
            "an image of the same size and time is not read again",
            "status.st_mtime_ns, status.st_ctime_ns, status.st_ino",
            "status.st_mtime_ns, status.st_ino",
            "tests/training/test_changes.py",
        ),
        (
            "reports/caption_probe.py",
            "evidence is not kept",
            "with suppress(OSError), shared_file(kept) as fresh:",
            "with suppress(OSError), shared_file(kept.with_name('other')) as fresh:",
            FEATURES,
        ),
        (
            "towers/text_groups.py",
            "grouped texts come back in the wrong order",
            "[order.argsort()]",
            "[order]",
            "tests/training/test_text_groups.py",
        ),
        (
            "towers/features.py",
            "text features stay sorted by length",
            "table.write(batch, features)",
            "table.write(np.sort(batch), features)",
            FEATURES,
        ),
    ),
    *faults_in(
        f"{PACKAGE}/search",
        ("exact.py", "equal scores come in the wrong order", "np.lexsort((best,", "np.lexsort((-best,", NEAREST),
        (
            "exact.py",
            "half precision drops images near the bound",
            "[-1]] - HALF_MARGIN",
            "[-1]] + HALF_MARGIN",
            NEAREST,
        ),
        (
            "duplicates.py",
            "a group reports its largest cosine",
            "min(similarity, self.weakest.get(low, 1.0)",
            "max(similarity, self.weakest.get(low, 1.0)",
            "tests/search",
        ),
        ("embeddings_file.py", "8 bits are searched without scales", "found * self.scales", "found", SHORT),
        ("embeddings_file.py", "the largest code is 126", "LARGEST = 127", "LARGEST = 126", SHORT),
        ("filters.py", "the last day is left out", "_bounds(self.until)[1]", "_bounds(self.until)[0]", QUERY),
        ("filters.py", "the next day is let in", 'pc.less(entries["date"]', 'pc.less_equal(entries["date"]', QUERY),
        (
            "unrelated.py",
            "a chance counts the captions that fit worse",
            'counted = 1 - self.best.searchsorted(fits, "left") / captions',
            'counted = self.best.searchsorted(fits, "left") / captions',
            "tests/search/test_unrelated.py",
        ),
        (
            "unrelated.py",
            "only the last images are compared with captions",
            "np.maximum(best, found.fits(images, captions).max(axis=0), out=best)",
            "best[:] = found.fits(images, captions).max(axis=0)",
            "tests/search/test_unrelated.py",
        ),
        (
            "unrelated.py",
            "an image is compared with the index, a query with the captions",
            "images @ self.captions.T, axis=1)",
            "images @ self.captions.T, axis=0)",
            "tests/search/test_unrelated.py",
        ),
        ("query.py", "unwanted words attract", "(-NEGATIVE_WEIGHT,", "(NEGATIVE_WEIGHT,", QUERY),
        ("query.py", "a combined query is not normalised", "(total / norm).astype", "total.astype", QUERY),
        (
            "approximate.py",
            "the first image is never found",
            "found[0][found[0] >= 0]",
            "found[0][found[0] > 0]",
            NEAREST,
        ),
        (
            "building/shards.py",
            "an image turned by 90 degrees keeps its size",
            "(orientation or 1) >= 5",
            "(orientation or 1) > 6",
            UPDATE,
        ),
    ),
    *faults_in(
        f"{PACKAGE}/utils",
        ("html.py", "a label is not escaped", "<b>{escape(label)}</b>", "<b>{label}</b>", HTML),
        (
            "match_grid.py",
            "a tie counts for the model",
            "(~(score < score[right])).sum()",
            "(score > score[right]).sum() + 1",
            MATCH_GRID,
        ),
        (
            "files.py",
            "recovery replaces a finished folder",
            "if former.exists() and not target.exists():",
            "if former.exists():",
            FILES,
        ),
        (
            "names.py",
            "a device with a suffix is a name",
            'name.partition(".")[0].rstrip(" ")',
            'name.rstrip(" ")',
            "tests/utils/test_names.py",
        ),
        (
            "processes.py",
            "a process of a fork server follows the server",
            'os.name == "nt" or os.getppid() != parent.pid',
            'os.name == "nt"',
            "tests/utils/test_commands.py",
        ),
        (
            "resources.py",
            "a name may leave the folder of data files",
            'path.is_relative_to(_root() / "configuration")',
            "path.is_relative_to(_root())",
            RESOURCES,
        ),
    ),
    *faults_in(
        PACKAGE,
        (
            "modeling_miniclip.py",
            "the mean counts padding",
            "/ weights.sum(dim=1).clamp(min=1)",
            "/ weights.shape[1]",
            MODEL,
        ),
        (
            "loss_miniclip.py",
            "only wrong keys are right",
            "logits.masked_fill(~positives,",
            "logits.masked_fill(positives,",
            LOSS,
        ),
        (
            "loss_miniclip.py",
            "positives are counted along the wrong axis",
            "/ positives.sum(dim=1)",
            "/ positives.sum(dim=0).max()",
            LOSS,
        ),
        (
            "loss_miniclip.py",
            "SigLIP's signs are swapped",
            "torch.where(positives, logits, -logits)",
            "torch.where(positives, -logits, logits)",
            LOSS,
        ),
        (
            "loss_miniclip.py",
            "the text loss is divided by the images",
            "text_loss / len(all_texts)",
            "text_loss / len(all_images)",
            LOSS,
        ),
        (
            "modeling_miniclip.py",
            "the end token is always the largest",
            "if eos_token_id == 2 else (ids",
            "if eos_token_id else (ids",
            ENCODERS,
        ),
        (
            "modeling_miniclip.py",
            "the first token 2 ends a text of an old CLIP",
            "if eos_token_id == 2 else (ids",
            "if eos_token_id == 0 else (ids",
            ENCODERS,
        ),
        (
            "modeling_miniclip.py",
            "another tokenizer's padding stays",
            "input_ids.masked_fill(attention_mask == 0, padding), None",
            "input_ids, None",
            ENCODERS,
        ),
        (
            "modeling_miniclip.py",
            "padding to a fixed length is masked",
            "masked_fill(attention_mask == 0, padding), None",
            "masked_fill(attention_mask == 0, padding), attention_mask",
            ENCODERS,
        ),
        (
            "modeling_miniclip.py",
            "the pooler replaces the class token",
            'if pooling == "cls":\n        return outputs.last_hidden_state[:, 0]',
            'if pooling == "cls":\n        return outputs.last_hidden_state[:, 1]',
            ENCODERS,
        ),
        (
            "configuration_miniclip.py",
            "a head's own bias is ignored",
            "depth > 1 if bias is None else bias",
            "depth > 1",
            ENCODERS,
        ),
        (
            "configuration_miniclip.py",
            "an unused pooler is built",
            '{"add_pooling_layer": pooling == "pooler"}',
            '{"add_pooling_layer": True}',
            ENCODERS,
        ),
        (
            "processing_miniclip.py",
            "ConvNeXT's crop is ignored",
            "int(edge / share)",
            "edge",
            ENCODERS,
        ),
        (
            "processing_miniclip.py",
            "another interpolation",
            'for name in ("resample", "rescale_factor"',
            'for name in ("rescale_factor"',
            ENCODERS,
        ),
        (
            "modeling_miniclip.py",
            "the bias is subtracted from the output",
            "logits_per_image = logits_per_image + logit_bias",
            "logits_per_image = logits_per_image - logit_bias",
            f"{MODEL} {LOSS}",
        ),
        (
            "modeling_miniclip.py",
            "the temperature has no bound",
            "self.logit_scale.clamp(max=math.log(self.config.logit_scale_max)).exp()",
            "self.logit_scale.exp()",
            f"{MODEL} {LOSS}",
        ),
        (
            "modeling_miniclip.py",
            "texts are normalised over the batch",
            "self.text_projection(text_pooler_output), dim=-1)",
            "self.text_projection(text_pooler_output), dim=0)",
            MODEL,
        ),
        (
            "processing_miniclip.py",
            "the longer edge is resized",
            "* side / min(image.size))",
            "* side / max(image.size))",
            PROCESSOR,
        ),
        (
            "processing_miniclip.py",
            "the crop rounds its margin up",
            "else margin // 2",
            "else (margin + 1) // 2",
            PROCESSOR,
        ),
        (
            "processing_miniclip.py",
            "pixels are multiplied by the deviation",
            ".sub_(mean).div_(std)",
            ".sub_(mean).mul_(std)",
            PROCESSOR,
        ),
        (
            "processing_miniclip.py",
            "RoBERTa gets one position too many",
            "rows -= text_config.pad_token_id + 1",
            "rows -= text_config.pad_token_id",
            PROCESSOR,
        ),
        (
            "processing_miniclip.py",
            "the margin of open_clip's crop is rounded down",
            "round(margin / 2) if",
            "margin // 2 if",
            PROCESSOR,
        ),
        ("pictures_miniclip.py", "16 bits are divided by 256", "values /= 257", "values /= 260", PROCESSOR),
    ),
    *faults_in(
        f"{PACKAGE}/api",
        ("trainer.py", "each process takes the mean of its part", "return part * processes", "return part", TRAINER),
        (
            "trainer.py",
            "images of two processes have the same numbers",
            "PROCESS * (dist.get_rank() + 1)",
            "PROCESS",
            TRAINER,
        ),
        ("clean_process.py", "the variables of a run stay", "del os.environ[name]", "pass", CLEAN_PROCESS),
        ("clean_process.py", "the program's setting is lost", "if not keeps:", "if True:", CLEAN_PROCESS),
        (
            "result.py",
            "the last validation is the best",
            "is_better(self.best_metric, line[self.best_metric], best[self.best_metric])",
            "True",
            RESULT,
        ),
    ),
]
