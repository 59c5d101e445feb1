"""The letters of the published table, against where its authors put the attacks."""

import json

import numpy as np
import pytest
from test_report import make_row, make_sweep

import ggl_jax as gx
from ggl_jax.audit import report, threat
from ggl_jax.audit.cells import Inputs
from ggl_jax.audit.sweep import plan
from ggl_jax.priors.gaussian import gaussian
from ggl_jax.spec import Client


def model_of(tiny_model, attack, client=None, **changes):
    search = gx.search_of("paper", attack, **changes)
    return threat.threat_model(search, client or Client(), tiny_model, gaussian((8, 8, 3), 4))


@pytest.mark.parametrize(
    ("attack", "client", "letter"),
    [
        # Carletti et al., table of attacks: Zhu et al. 2019 and Zhao et al. 2020 are A, Geiping et
        # al. 2020 B, Li et al. 2022 (GGL) D, and Yin et al. 2021 E, with the batch's statistics.
        ("dlg", Client(), "A"),
        ("idlg", Client(), "A"),
        ("ig", Client(), "B"),
        ("ggl", Client(), "D"),
        ("gi", Client(share_statistics=True), "E"),
        # Dimitrov et al. 2022, local training of pixels, C.
        ("ig", Client(local_steps=5), "C"),
        ("dlg", Client(local_learning_rate=0.5), "A"),
        ("map", Client(local_steps=5), "D"),
        # Labels of a batch are told apart by the model's answers to samples of the prior.
        ("ig", Client(batch_size=4), "D"),
        ("dlg", Client(batch_size=4), "A"),
    ],
)
def test_letters_are_those_of_the_table(tiny_model, attack, client, letter):
    assert model_of(tiny_model, attack, client).letter == letter


def test_words_say_what_varies(tiny_model):
    def knows(attack="ig", client=None, **changes):
        return model_of(tiny_model, attack, client, **changes).sentence()

    assert "the update of one image" in knows()
    four = knows(client=Client(batch_size=4, local_steps=5))
    assert "4 images and their number" in four
    assert "local steps 5, local learning rate 0.01" in four
    assert "public images for the labels alone" in four
    assert "no public images" in knows()
    assert "nothing of the defense" in knows(adaptive=False)
    assert "whose parameters are estimated" in knows(adaptive=True)
    assert "no labels" in knows(labels="searched")
    assert "no BatchNorm" in knows()


def test_own_attacks_are_given_the_prior(tiny_model, monkeypatch):
    monkeypatch.setitem(gx.ATTACKS, "mine", lambda *args, **kwargs: None)
    assert model_of(tiny_model, "mine", space="pixels").letter == "D"


def test_a_sweep_declares_each_and_its_report_says_it_in_a_line(tiny_model, tmp_path):
    prior = gaussian((8, 8, 3), 4)
    inputs = Inputs([np.full((8, 8, 3), 0.5)], [0], tiny_model, prior, prior.init(None))
    axes = {"attack": ["dlg", "ig"], "defense": ["none", "noise:1"], "seed": [0, 1]}
    config = json.loads(json.dumps(plan(inputs, axes, search="quick").config))
    assert [one["letter"] for one in config["threat_model"]] == ["A", "B"]
    records = make_sweep(tmp_path / "s", [make_row("c", "a", "none", 12.0)])
    text = report.make(records._replace(config=config)).text()
    (line,) = [line for line in text.splitlines() if line.startswith("- Threat model")]
    assert "A (eavesdropper), B (informed eavesdropper)" in line
    assert "the update of one image" in line  # what all know
    assert "no labels" not in line


def test_one_threat_model_is_told_whole_and_none_is_left_out(tiny_model, tmp_path):
    records = make_sweep(tmp_path / "s", [make_row("c", "a", "none", 12.0)])
    assert "Threat model" not in report.make(records).text()
    one = model_of(tiny_model, "ggl")
    records.config["threat_model"] = [one._asdict()]
    text = report.make(records).text()
    assert "- Threat model: D (data-enhanced eavesdropper), who knows the model (" in text
