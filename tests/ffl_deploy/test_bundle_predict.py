"""The library's three lines: load_bundle(path).predict(images)."""

from __future__ import annotations

import numpy as np

from ffl_deploy.bundle import Bundle


def test_predict_gives_the_models_own_logits(tiny_bundle: Bundle) -> None:
    golden = tiny_bundle.golden()
    predictions = tiny_bundle.predict(list(golden.images), batch_size=3)
    assert len(predictions) == len(golden.images)
    np.testing.assert_allclose([p.logits for p in predictions], golden.logits, rtol=1e-5, atol=1e-5)
    assert [p.label_id for p in predictions] == golden.logits.argmax(axis=1).tolist()
