"""Figures are of the numbers they say."""

import pytest
import torch
from saewb_widgets.figures import feature_similarity

from saewb.sae.sae import SAE, SAEConfig
from saewb.synthetic import matched_sae, random_dictionary


def test_a_recovered_dictionary_is_a_diagonal():
    dictionary = random_dictionary(12, 8)
    shuffled = torch.tensor([5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10])
    sae = matched_sae(SAE(SAEConfig(8, 12)), dictionary, order=shuffled)
    figure = feature_similarity(sae, dictionary.directions)
    z = torch.tensor(figure.data[0].z)
    assert torch.allclose(z.diagonal(), torch.ones(12, dtype=z.dtype))
    assert list(figure.data[0].y) == [str(int(i)) for i in shuffled.argsort()]
    cosines = dictionary.directions @ dictionary.directions.T
    torch.testing.assert_close(z.float(), cosines, atol=6e-4, rtol=0)


def test_too_many_to_draw_is_said():
    with pytest.raises(ValueError, match=r"501 latents[\s\S]*500 at most"):
        feature_similarity(torch.randn(501, 4), torch.randn(3, 4))
