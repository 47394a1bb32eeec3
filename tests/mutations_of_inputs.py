"""Mutations of what the library checks of its inputs, and of what it shares between algorithms; see `mutations.py`."""

from tests.mutating import Mutation as M

# fmt: off
INPUTS = [
    M("last step of an SDE, extrapolated", "jnp.where(noisy, 0, 1)", "jnp.where(noisy, 1, 1)", "test_solvers_last_step.py"),
    M("table of betas, with corners", "jnp.polyval(cubic, position", "jnp.polyval(cubic[2:], position",
      "test_schedules.py::test_the_rate_of_a_table_is_continuous_and_of_its_entries_in_the_mean"),
    M("shape of a control, its dimensions alone", "if jnp.shape(found) != x.shape:", "if jnp.ndim(found) != x.ndim:", "test_shapes.py"),
    M("a model with a control of its own, saved", "if not isinstance(control := model.sampler.control, NetworkScore):",
      "control = model.sampler.control\n    if not callable(control):", "test_shapes.py"),
    M("samples that are not finite, judged", "bad = np.flatnonzero(~finite)", "bad = np.flatnonzero(~finite)[:0]",
      "test_rewards.py::test_samples_that_are_not_finite_are_not_judged"),
    M("rewards beyond the range, infinite", "np.isfinite(values) & ~np.isfinite(kept)", "np.isfinite(values) & np.isnan(kept)",
      "test_rewards.py::test_what_is_no_number_for_each_sample_is_refused_by_name"),
    M("masked rewards, taken", "and np.ma.count_masked(found):", "and not np.ma.count_masked(found) + 1:",
      "test_rewards.py::test_what_is_no_number_for_each_sample_is_refused_by_name"),
    M("pairs of a reward, refused", "isinstance(found[1], Mapping)", "isinstance(found[1], list)",
      "test_rewards.py::test_numbers_are_taken_in_whatever_form_they_come"),
    M("vocabulary, smaller", "if len(tokenizer) != words:", "if len(tokenizer) > words:",
      "test_stable_diffusion_folder.py::test_a_tokenizer_without_its_whole_vocabulary_is_refused"),
    M("repeated prompts, drawn once", "replace=groups > count, p=p)", "replace=groups > count)",
      "test_text_to_image.py::test_prompts_are_drawn_in_groups"),
    M("a finished run, shortened", "and done < iterations\n", "and done > iterations\n",
      "test_runs.py::test_a_finished_run_goes_on_to_more_iterations_and_not_back"),
    M("a run that has begun, claimed by another", "if differences and self._has_begun():", "if differences and not self._has_begun():",
      "test_runs.py::test_a_start_that_failed_claims_no_folder"),
    M("weights, nan alone", "if not np.isfinite(array).all():", "if np.isinf(array).any():",
      "test_stable_diffusion_folder.py::test_weights_that_are_not_finite_are_refused"),
    M("status of a server, not looked at", "if error.code < 500:", "if error.code < 0:", "test_remote_rewards.py"),
    M("programs of another division, shared", "shared(assemble.select, recipe.division, 0)",
      "shared(assemble.select, recipe.division._replace(stratified=False), 0)", "test_algorithms.py -k stratified"),
]
# fmt: on
