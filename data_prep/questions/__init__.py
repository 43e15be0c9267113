"""Questions about scenes whose answers follow from the ground truth, written so that the words alone give nothing away.

The answer is chosen first, from a list in which every answer (and every position among the choices) stands equally
often; then a scene is drawn in which it is true. So P(answer | question, choices) is uniform by construction, and
:mod:`data_prep.text_check` measures that it is.

``choice``, ``spatialsoundqa`` and ``caption`` hold the types of questions, ``planning`` knows all of them by name,
deals them out and makes samples, ``records`` writes samples as other benchmarks have them.
"""
