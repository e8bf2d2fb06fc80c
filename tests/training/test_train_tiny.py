"""Every objective, an SAE and transcoders of it, on the embedded model: one stream, one forward pass for all."""

import pytest

import saewb

HOOK, READ, WRITE = "blocks.2.hook_resid_post", "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
OBJECTIVES = {
    "standard": saewb.Standard(256, l1=0.4),
    "gated": saewb.Gated(256, l1=0.4),
    "topk": saewb.TopK(256, k=16),
    "abstopk": saewb.AbsTopK(256, k=16),
    "batchtopk": saewb.BatchTopK(256, k=16.0),
    "matryoshka": saewb.Matryoshka(256, k=16.0, widths=(64, 128)),
    "jumprelu": saewb.JumpReLU(256, target_l0=16.0, bandwidth=0.1, init_threshold=0.05),
    "pursuit": saewb.MatchingPursuit(256, max_iterations=12),
    "transcoder": saewb.Trainee(saewb.TopK(256, k=16), read=READ, write=WRITE),
    "skip": saewb.Trainee(saewb.TopK(256, k=16, skip=True), read=READ, write=WRITE),
}


@pytest.mark.long
def test_every_objective_trains_on_the_embedded_model():
    model = saewb.load_model("tiny", device="cpu")
    texts = [document.text for document in saewb.tiny.texts()]
    run = saewb.train(model, texts, OBJECTIVES, hook=HOOK, n_tokens=120_000, batch_tokens=1024, lr=3e-3, seed=0)
    assert run.wait().state == "finished"
    held_out = [document.text for document in saewb.tiny.held_out_texts()[:40]]
    table = saewb.evaluate_many(model, dict(run.saes), held_out)
    print(table[["ce_recovered_mean", "fvu", "l0", "dead_frac"]].round(3).to_string())
    assert list(table.index) == list(OBJECTIVES)
    saes = table.drop(index=["transcoder", "skip"])
    assert (saes.fvu < 0.4).all()
    assert (saes.ce_recovered_mean > 0.75).all()
    assert table.fvu["skip"] < table.fvu["transcoder"] < 0.8
    assert table.ce_recovered_mean["skip"] > table.ce_recovered_mean["transcoder"] > 0.3
