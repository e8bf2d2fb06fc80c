"""Notebook 09 covers what SAELens has: every public name stands beside its saewb form, or the reason there is none."""

import ast
import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_from_saelens_to_saewb.ipynb"

# What SAELens does by area, as names that a user of it types.
ENTRIES = {
    "attaching": """HookedSAETransformer SAETransformerBridge boot_transformers saes add_sae reset_saes acts_to_saes
        run_with_saes run_with_cache_with_saes run_with_hooks_with_saes reset_saes_end use_error_term prev_saes
        exclude_special_tokens get_sae_hook_name hook_sae_acts_post""",
    "architectures": """SAE SAEConfig StandardSAE GatedSAE TopKSAE AbsTopKSAE JumpReLUSAE MatchingPursuitSAE TemporalSAE
        Transcoder SkipTranscoder JumpReLUTranscoder JumpReLUSkipTranscoder SAEMetadata register_sae_class
        register_sae_training_class fold_W_dec_norm fold_activation_norm_scaling_factor fold_activation_whitening
        encode decode process_sae_in get_name""",
    "loading": """from_pretrained from_pretrained_with_cfg_and_sparsity load_from_disk load_from_pretrained from_dict
        force_download converter load_sae_config_from_huggingface get_pretrained_saes_directory PretrainedSAELookup
        PretrainedSaeHuggingfaceLoader PretrainedSaeDiskLoader get_repo_id_and_folder_name get_config_overrides
        get_releases_for_repo_id load_model model_class_name HookedMamba HookedProxyLM save_model save_inference_model
        upload_saes_to_huggingface""",
    "normalization": """normalize_activations apply_b_dec_to_input reshape_activations covariance_whitening
        ActivationScaler""",
    "objectives": """StandardTrainingSAEConfig GatedTrainingSAEConfig TopKTrainingSAEConfig AbsTopKTrainingSAEConfig
        BatchTopKTrainingSAEConfig MatryoshkaBatchTopKTrainingSAEConfig JumpReLUTrainingSAEConfig
        MatchingPursuitTrainingSAEConfig l1_coefficient lp_norm aux_loss_coefficient matryoshka_widths
        use_matryoshka_aux_loss jumprelu_sparsity_loss_mode jumprelu_bandwidth jumprelu_ste_to_input target_l0
        pre_act_loss_coefficient decoder_init_norm TrainCoefficientConfig""",
    "activations": """ActivationsStore from_sae from_config from_cache_activations next_batch get_batch_tokens
        get_activations get_data_loader concat_and_batch_sequences disable_concat_sequences sequence_separator_token
        prepend_bos use_chat_formatting seqpos_slice hook_head_index mixing_buffer activations_mixing_fraction
        n_batches_in_buffer prefetch_llm_batches is_dataset_tokenized streaming PretokenizeRunner
        PretokenizeRunnerConfig pretokenize_runner CacheActivationsRunner CacheActivationsRunnerConfig
        use_cached_activations""",
    "training": """LanguageModelSAERunnerConfig LanguageModelSAETrainingRunner SAETrainingRunner SAETrainer TrainingSAE
        MultiSAETrainingRunner MultiSAETrainingRunnerConfig training_tokens train_batch_size_tokens context_size
        lr_scheduler_name lr_warm_up_steps lr_decay_steps autocast autocast_lm compile_llm compile_sae
        dead_feature_window n_batches_for_norm_estimate from_pretrained_path n_checkpoints checkpoint_path
        resume_from_checkpoint llm_device act_store_device seed LoggingConfig log_to_wandb log_weights_to_wandb""",
    "evaluating": """run_evals EvalConfig get_eval_everything_config multiple_evals process_results LLMSaeEvaluator
        MultiSAEEvaluator ce_loss_score kl_div_score consistent_activation_heuristic
        get_downstream_reconstruction_metrics get_sparsity_and_variance_metrics get_featurewise_weight_based_metrics
        get_recons_loss all_loadable_saes get_saes_from_regex ExplainedVarianceCalculator""",
    "statistics": """compute_superposition_stats compute_correlation_matrix_stats
        compute_low_rank_correlation_matrix_stats generate_random_correlation_matrix
        generate_random_low_rank_correlation_matrix LowRankCorrelationMatrix""",
    "synthetic": """FeatureDictionary orthogonalize_embeddings ActivationGenerator SyntheticModel HierarchyNode
        hierarchy_modifier generate_hierarchy zipfian_firing_probabilities linear_firing_probabilities
        random_firing_probabilities generate_magnitudes train_toy_sae eval_sae_on_synthetic_data
        mean_correlation_coefficient feature_uniqueness init_sae_to_match_feature_dict plot_sae_feature_similarity
        find_best_feature_ordering""",
    "dashboards": """open_neuronpedia_feature_dashboard get_neuronpedia_quick_list get_neuronpedia_feature
        make_neuronpedia_list_with_features SAEDashboard sae_vis get_enrichment_df get_test_gene_sets
        get_gene_set_from_regex manhattan_plot_enrichment_scores""",
}
OWN = re.compile(r"saewb(?:_widgets)?(?:\.\w+)+")


def cells():
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]


def markdown():
    return "\n".join(text for kind, text in cells() if kind == "markdown")


def rows(text):
    """The tables' rows: (what SAELens has, what saewb has)."""
    result = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert all(len(row) == 2 for row in result), result
    return [(left.strip(), right.strip()) for left, right in result if left.strip() != "SAELens"]


def theirs(text):
    """The code blocks of SAELens."""
    return [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if block.startswith("# SAELens")]


def covered():
    text = markdown()
    left = " ".join([*(row[0] for row in rows(text)), *theirs(text)])
    return set(re.findall(r"\w+", left))


@pytest.mark.parametrize("area", ENTRIES)
def test_every_entry_is_there(area):
    missing = set(ENTRIES[area].split()) - covered()
    assert not missing


def test_every_row_has_an_answer_and_every_cell_of_theirs_one_of_ours():
    text = markdown()
    assert len(rows(text)) > 80
    assert all(len(right) > 10 for _, right in rows(text))
    kinds = [(kind, bool(theirs(text))) for kind, text in cells()]
    pairs = [kinds[i + 1][0] for i, (kind, has) in enumerate(kinds) if kind == "markdown" and has]
    assert len(pairs) >= 8
    assert set(pairs) == {"code"}


def test_their_cells_are_python():
    for block in theirs(markdown()):
        ast.parse(block)


def test_names_of_ours_exist():
    import saewb_widgets.figures  # a module that its package does not name

    names = set(OWN.findall(" ".join(text for _, text in cells()))) - {"saewb.git", "saewb.ipynb"}
    assert len(names) > 70
    for name in names:
        package, *parts = name.split(".")
        result = saewb_widgets if package == "saewb_widgets" else importlib.import_module(package)
        for part in parts:
            result = getattr(result, part)


def said(code):
    """A table's code as Python: `f(a=, b=)` leaves out what is passed."""
    code = re.sub(r"=, \.\.\.\)", "=)", re.sub(r"^with ", "", re.sub(r": model.*$", "", code)))
    return ast.parse(re.sub(r"(\w+)=(?=[,)])", r"\1=...", code))


def calls(section=""):
    """(the call, what is called) of every `saewb.f(...)` in the right column."""
    import saewb

    for _, right in rows(markdown().partition(section)[2] if section else markdown()):
        for code in re.findall(r"`([^`]*saewb\.[^`]*\([^`]*)`", right):
            for node in ast.walk(said(code)):
                if isinstance(node, ast.Call) and re.fullmatch(r"saewb(\.\w+)+", name := ast.unparse(node.func)):
                    yield node, eval(name, {"saewb": saewb})


def test_calls_of_ours_take_what_they_are_given():
    import saewb

    options = {option.name for option in saewb.training_options()}
    result = list(calls())
    assert len(result) > 50
    for node, called in result:
        if any(isinstance(argument, ast.Constant) and argument.value is ... for argument in node.args):
            arguments = []  # what `...` stands for is not known
        else:
            arguments = node.args
        names = {keyword.arg for keyword in node.keywords}
        known = inspect.signature(called)
        if called is saewb.train:
            assert names <= {*known.parameters, *options}, ast.unparse(node)
            names -= options
        known.bind_partial(*arguments, **dict.fromkeys(names))


def test_options_in_the_table_of_training_are_there():
    import saewb

    text = markdown().partition("`LanguageModelSAERunnerConfig`, `LanguageModelSAETrainingRunner`")[2]
    text = "| " + text.partition("\n## ")[0]
    objectives = (getattr(saewb, name) for name in saewb.training.objectives.__all__ if name in saewb.__all__)
    known = {
        *(option.name for option in saewb.training_options()),
        *(field.name for objective in objectives for field in dataclasses.fields(objective)),
        *inspect.signature(saewb.train).parameters,
    }
    bare = {name for _, right in rows(text) for name in re.findall(r"`([a-z]\w*)(?:=[^`(]*(?:\([^`]*)?)?`", right)}
    assert len(bare) > 30
    assert bare <= known


def test_methods_of_ours_are_there():
    import saewb

    sae = saewb.SAE(saewb.SAEConfig(8, 16, activation="jumprelu", skip=True, hook="a", hook_out="b"))
    of = {"sae": sae, "run": saewb.Run, "index": saewb.FeatureIndex, "attached": saewb.Attachment}
    right = " ".join(row[1] for row in rows(markdown()))
    matches = re.findall(r"`(?:\w+ = )?(sae|run|index|attached)\.(\w+)(?:\.(\w+))?", right)
    assert len(matches) > 12
    for owner, name, field in matches:
        value = getattr(of[owner], name)
        assert not field or hasattr(value, field), (owner, name, field)


class TestAgainstSAELens:
    """In the environment that has it."""

    @pytest.fixture
    def sae_lens(self):
        return pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")

    @pytest.mark.parametrize("module", ["sae_lens", "sae_lens.synthetic"])
    def test_every_public_name_is_there(self, sae_lens, module):
        missing = set(importlib.import_module(module).__all__) - covered()
        assert not missing

    def test_their_code_imports_what_there_is(self, sae_lens):
        for block in theirs(markdown()):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
