"""Word order in the model card of a run with hard negatives."""

from datasets import Image as UndecodedImage

from ...errors import DataError
from ...evaluation.encoders import MiniClipEncoder
from ...evaluation.order_pairs import swapped_pairs
from ...evaluation.order_test import ORDER_NOTE, order_report, order_table, score_pairs
from ...hub.model_card import add_section
from ...modeling_miniclip import MiniClipModel
from ..hard_negatives import hard_negatives_of
from ..run import TrainingRun

IMAGES = 1000  # validation images that are tested


def report_word_order(run: TrainingRun, exported: MiniClipModel) -> None:
    """Test the exported model on validation captions with swapped words; add the figures to its card and the log.

    Nothing happens without hard negatives, or if the captions are not English.

    Args:
        run: finished run, on its main process.
        exported: its model, loaded again.
    """
    if hard_negatives_of(run.arguments) is None:
        return
    split = run.validation_split.select(run.bad_images.good_rows("validation")[:IMAGES])
    images = split.select_columns(["image"]).cast_column("image", UndecodedImage(decode=False))
    try:
        pairs = swapped_pairs(split["captions"], images, "validation split")
        scores = score_pairs(MiniClipEncoder(exported, run.processor), pairs)
    except DataError:  # other languages, or a single image
        return
    report = order_report(pairs, scores)
    figures = list(report["kinds"].values())[-1]
    head, rows = order_table(report)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = (
        f"Captions of {len(split):,} validation images with words swapped: {ORDER_NOTE}. Brackets hold 95 % "
        "confidence intervals (bootstrap over images)."
    )
    add_section(run.export_dir / "README.md", "Word order", f"{note}\n\n{table}", before="## Training")
    run.say(
        f"word order: true captions score above swapped ones in {figures['right_image']:.1f} % of pairs, with another "
        f"image in {figures['wrong_image']:.1f} %"
    )
