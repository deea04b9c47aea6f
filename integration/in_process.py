"""Recall and answer with the model of an index in a process of its own, as JSON.

    python -m integration.in_process INDEX < questions.json

This is for models that load only in a process set up for them. The input is {"texts": [...], "images": [files],
"question": ...}. Texts and images are queries. The question is put about each image.
"""

import json
import sys
from pathlib import Path

from llama_index.core.schema import ImageNode, NodeWithScore, QueryBundle

from llama_index_genret import GenerativeImageRetriever, InProcessLLM, image_query_engine
from llama_index_genret.scorers.transformers import TransformersScorer
from llama_index_genret.store import load_index
from llama_index_genret.store.model_loading import load_trained

TOP_K, ANSWER_TOKENS = 5, 4


def ranked(retriever, query):
    """Return image ids and log-probabilities."""
    nodes = retriever.retrieve(query)
    return {node.node.node_id: node.node.metadata["genret_log_prob"] for node in nodes}


def answers(llm, retriever, question, images):
    """Return the answers of `llm` to the question about each image alone, without surrounding spaces."""
    engine = image_query_engine(retriever, llm)
    shown = [[NodeWithScore(node=ImageNode(image_path=image, image_mimetype="image/png"))] for image in images]
    return [str(engine.synthesize(QueryBundle(question), nodes)).strip() for nodes in shown]


def main(folder):
    questions = json.load(sys.stdin)
    index = load_index(folder)
    mllm = load_trained(index, device="cpu")
    retriever = GenerativeImageRetriever(index, TransformersScorer(mllm), similarity_top_k=TOP_K)
    found = {
        "texts": [ranked(retriever, text) for text in questions["texts"]],
        "images": [ranked(retriever, QueryBundle("", image_path=image)) for image in questions["images"]],
        "answers": answers(
            InProcessLLM(mllm, max_tokens=ANSWER_TOKENS), retriever, questions["question"], questions["images"]
        ),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
