# SPDX-License-Identifier: Apache-2.0
"""Mean-field inference of fully connected CRFs: the public functions that return marginals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import _crf_arguments as check
from ._crf_backends import mean_field
from ._crf_features import make_model


def dense_crf(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    iterations: int = 10,
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
    output: str = "probabilities",
    feature_gradient: str = "filter",
    recompute: bool = False,
    precision: str = "accurate",
) -> Tensor:
    r"""Refine label scores with a fully connected CRF, by mean-field inference.

    Every pair of points of an image is connected; how strongly, Gaussian kernels :math:`K_k` on
    positions, colours or any other features say. From :math:`Q_0 = \mathrm{softmax}(z)`, with z the
    logits, exactly ``iterations`` times for all points at once:

    .. math:: Q_{t+1} = \mathrm{softmax}\Bigl(z + \sum_k C_k\,(\hat K_k Q_t)\Bigr), \qquad
              K_{k,ij} = \exp\bigl(-|f_{k,i} - f_{k,j}|^2 / 2\bigr)

    with :math:`C_k` the label compatibility and :math:`\hat K_k` the normalised kernel.

    **Signs.** In all three forms of ``compat``, **positive attracts** equal labels: ``w``,
    ``[w] * L`` and ``w`` times the unit matrix are the same model. This is the one table that
    relates them to pydensecrf (and to ``pydense.densecrf``):

    ================  ==========================  ==================================================
    ``compat`` here   added to the logit of l     the same in pydensecrf
    ================  ==========================  ==================================================
    number ``w``      ``w * m[l]``                ``w``
    ``(L,)`` v        ``v[l] * m[l]``             ``-v``: there a positive diagonal repels
    ``(L, L)`` M      ``(M @ m)[l]``              ``-M`` for a symmetric M: there an entry is a
                                                  cost, and M is replaced by ``(M + M.T) / 2``.
                                                  ``-w * (1 - I)`` here, ``w * (1 - I)`` there,
                                                  equals the number ``w``
    ================  ==========================  ==================================================

    where :math:`m = \hat K Q` at the point. M need not be symmetric here: row l of M acts on
    label l.

    Args:
        unary: (N, L, H, W) images, (N, L, D, H, W) volumes or (N, L, P) point sets; float32,
            float64, float16 or bfloat16, any strides; L from 1 to 65536. What it holds,
            ``unary_type`` says. -inf (an energy of +inf, a probability of 0) forbids a label: clamp
            probabilities that only underflowed.
        image: (N or 1, channels, *spatial), usually 0..255, uint8 or any other real dtype; one
            image serves the whole batch. Only ``bilateral`` looks at it.
        gaussian: ``dict(sxy=..., compat=...)``: smoothness, with the features (x / sx, y / sy[,
            z / sz]). ``sxy`` is a number or one per axis (x, y[, z]), in pixels.
        bilateral: ``dict(sxy=..., srgb=..., compat=...)``: appearance, with the features (x / sx,
            y / sy[, z / sz], channels / srgb). ``srgb`` is a number or one per channel, in the
            image's own units.
        features: Any number of ``dict(features=..., compat=...)``; features (N or 1, d, *spatial),
            already divided by their standard deviations, d up to 32.
            ``compat`` everywhere: a number, (L,) or (L, L), as sequence or tensor; see the table.
        iterations: Number of updates T; 0 gives softmax(z).
        normalization: With :math:`n = K 1`: ``"symmetric"`` for :math:`n^{-1/2} K n^{-1/2}`,
            ``"after"`` for :math:`n^{-1} K`, ``"before"`` for :math:`K n^{-1}`, ``None`` for K.
        self_term: True keeps the weight of every point with itself, as pydensecrf does; False takes
            it out of K and out of n, as the paper has it. What is left of n on a lattice counts as
            at least 1e-3 of the whole: less is rounding error, of a point without neighbours.
        backend: ``"lattice"``: kernels on a permutohedral lattice, in time linear in the number of
            points; an approximation, the one that pydensecrf makes. ``"exact"``: sums over all
            pairs of points, in time quadratic in their number and without a table of pairs.
        unary_type: ``"logits"`` z, ``"energy"`` -z, or ``"probabilities"`` exp(z).
        output: ``"probabilities"`` Q_T; ``"logits"``, of which Q_T is the softmax (the argument of
            the last softmax above); ``"labels"``, the argmax of Q_T, ties to the lowest label.
        feature_gradient: How a lattice is differentiated by its features, see below: ``"filter"``
            or, for checks, ``"lattice"``.
        recompute: Keep nothing of the iterations for backward and run them again there: a forward
            pass more, for T marginals less between the two. See below for what backward holds.
        precision: Of ``backend="exact"``: ``"accurate"`` or ``"fast"``, which on a GPU sums with
            tensor cores, to a relative error of 1e-3 in L2 per sum, see ``exact_gaussian_filter``.

    **Gradients** reach ``unary``, every ``compat`` and, through the features, ``image``, the
    tensors in ``features``, and ``sxy`` and ``srgb`` where those are tensors (of one value, or one
    per axis or channel). Those of ``unary`` and ``compat`` are exact: the transposed lattice blurs
    its axes in reversed order. By its features a lattice is continuous, but its own derivative
    (``"lattice"``: what finite differences see; ``self_term=True`` only) is far from that of the
    Gaussian kernel it stands for. ``"filter"`` has the derivative of the Gaussian, with sums over
    all pairs made by the lattice:
    :math:`\sum_j a_i b_j K_{ij} (f_j - f_i) = a_i\,(K (b f) - f\,K b)_i`, and through n. It takes
    about 2 (d + 1) T filters of L channels. ``backend="exact"`` has the true gradient of all
    arguments. Labels have no gradient; there is no second derivative on lattices.

    Returns:
        Probabilities and logits: shape, dtype and memory format of ``unary`` (channels_last is
        kept, everything else becomes contiguous). Labels: (N, *spatial) int64. Computed in
        float64 for a float64 ``unary`` and in float32 otherwise, under autocast too.

        Bitwise the same from run to run, for any number of threads (``torch.set_num_threads``), for
        an image alone and in a batch. With ``backend="lattice"``, float32 images have the bits of
        ``pydense.densecrf.DenseCRF2D``; volumes are summed in another order than its ``DenseCRF``
        and agree to rounding.

    Raises:
        ValueError: Shapes that do not fit, NaN or +inf in the logits, a point whose labels are all
            forbidden, features that are not finite or beyond the range of the lattice's integer
            coordinates, sigmas that are not positive and finite, an unknown word.
        TypeError: An argument of the wrong type or dtype.
        NotImplementedError: Tensors that are neither on the CPU nor on a GPU (cuda); on lattices,
            in ``backward`` of ``backward``.

    On a GPU, the lattice has the simplices and weights of the CPU's, bit for bit, and results and
    gradients agree to rounding. Building a lattice waits for the GPU once (twice where coordinates
    do not fit 64 bits); iterating and its backward never do and can be captured in a CUDA graph. So
    numbers are not looked at there: a point with NaN, +inf or nothing but -inf is not an error but
    gets NaN, or the label -1, and so do points that it reaches. ``backend="exact"`` looks at no
    features there, either, waits for nothing, and can be captured as it is.

    Memory: a lattice of 6 to 8 (d + 1) bytes per point and up to 4 (d + 1) per vertex for every
    kernel and image (while it is built, as much again and features of 4 d bytes per point), for
    the image at work rows of 4 L bytes per vertex, L rounded up to a multiple of 8 (of 16 above
    32), once for each band of up to 10,240 pixels that touches it, 40 L KB per thread, and the
    result; numbers take twice that in float64. Where the self term is taken out and the output is
    not probabilities, Q is kept beside it. The lattice of ``gaussian`` is kept for the next call,
    see ``clear_lattice_cache``. On a GPU: lattices of 16 (d + 1) bytes per point and 8 (d + 1) + 12
    per vertex; while iterating two arrays of the unary's size, labels padded to a multiple of 8 (a
    third for matrices, a fourth above 128 labels or 4 kernels), and two rows per vertex and one per
    64 corners and vertex.

    Saved for backward: the lattices, the result, and T marginals with rows of L rounded up as above
    (4 T L bytes per point: 74 MB for 321 x 481, 21 labels, T = 5); with ``recompute`` the unary
    instead of the marginals, which backward then makes again: for the images at work, one or one
    per thread; on a GPU, and where features need a gradient, for the whole batch. Backward itself
    takes one more marginal (on a GPU five, and two rows per vertex), T more where features need a
    gradient. ``backend="exact"`` saves what torch's autograd keeps of every step, some six
    marginals, and does not heed ``recompute``.

    Source: P. Krähenbühl, V. Koltun, *Efficient Inference in Fully Connected CRFs with Gaussian
    Edge Potentials*, NeurIPS 2011; A. Adams, J. Baek, M. A. Davis, *Fast High-Dimensional Filtering
    Using the Permutohedral Lattice*, Eurographics 2010; feature order, normalisation and defaults
    as in pydensecrf.

    Example:
        >>> import torch
        >>> from pydense.ops import dense_crf
        >>> truth = (torch.arange(40) >= 20).long().expand(1, 30, 40)
        >>> image = 60 + 120 * truth.unsqueeze(1).expand(1, 3, 30, 40).byte()
        >>> logits = torch.nn.functional.one_hot(truth, 2).movedim(3, 1) + torch.randn(1, 2, 30, 40)
        >>> labels = dense_crf(
        ...     logits,
        ...     image,
        ...     gaussian=dict(sxy=3, compat=3),
        ...     bilateral=dict(sxy=80, srgb=13, compat=10),
        ...     output="labels",
        ... )
        >>> bool((logits.argmax(1) != truth).sum() > 100), int((labels != truth).sum())
        (True, 0)
    """
    op = "dense_crf"
    steps = check.integer(op, "iterations", iterations, 0, check.MAX_ITERATIONS)
    check.choice(op, "output", output, ("probabilities", "logits", "labels"))
    check.choice(op, "feature_gradient", feature_gradient, ("filter", "lattice"))
    check.flag(op, "recompute", recompute)
    if feature_gradient == "lattice" and not self_term:
        raise ValueError(f"{op}: feature_gradient must be 'filter' with self_term=False")
    model = make_model(
        op,
        unary,
        image,
        gaussian=gaussian,
        bilateral=bilateral,
        features=features,
        normalization=normalization,
        self_term=self_term,
        backend=backend,
        unary_type=unary_type,
        devices=check.DEVICES,
        precision=precision,
    )
    result = mean_field(model, feature_gradient, recompute)(steps, None, output)
    if output == "labels":
        return result.view(unary.shape[0], *unary.shape[2:])
    return _as_unary(result, unary)


def dense_crf_steps(
    unary: Tensor,
    image: Tensor | None = None,
    *,
    gaussian: Mapping[str, Any] | None = None,
    bilateral: Mapping[str, Any] | None = None,
    features: Sequence[Mapping[str, Any]] = (),
    iterations: int | None = 10,
    normalization: str | None = "symmetric",
    self_term: bool = True,
    backend: str = "lattice",
    unary_type: str = "logits",
    precision: str = "accurate",
) -> Iterator[Tensor]:
    """Iterate over the marginals Q_1, Q_2, ... of ``dense_crf``.

    The arguments are checked and the lattices built by the call, once. The t-th tensor is what
    ``dense_crf(..., iterations=t)`` returns, bit for bit. Q_0 is ``dense_crf(..., iterations=0)``.

    Args:
        unary: See ``dense_crf``, as for all arguments that are not named here.
        image: See ``dense_crf``.
        gaussian: See ``dense_crf``.
        bilateral: See ``dense_crf``.
        features: See ``dense_crf``.
        iterations: Number of tensors; ``None`` for as many as are asked for.
        normalization: See ``dense_crf``.
        self_term: See ``dense_crf``.
        backend: See ``dense_crf``.
        unary_type: See ``dense_crf``.
        precision: See ``dense_crf``.

    Returns:
        An iterator over tensors of the shape, dtype and memory format of ``unary``, each a new one.
        Read them only: the next one is computed from the last.

    Raises:
        ValueError: See ``dense_crf``.
        TypeError: See ``dense_crf``.
        NotImplementedError: See ``dense_crf``.

    Memory: that of ``dense_crf``, held until the iterator is dropped, and two marginals.

    Example:
        Stop when hardly any probability moves:

        >>> import torch
        >>> from pydense.ops import dense_crf, dense_crf_steps
        >>> logits = torch.randn(1, 3, 20, 30)
        >>> last = dense_crf(logits, iterations=0)
        >>> for q in dense_crf_steps(logits, gaussian=dict(sxy=3, compat=1), iterations=None):
        ...     if (q - last).abs().max() < 1e-3:
        ...         break
        ...     last = q
    """
    op = "dense_crf_steps"
    if iterations is not None:
        iterations = check.integer(op, "iterations", iterations, 0, check.MAX_ITERATIONS)
    model = make_model(
        op,
        unary,
        image,
        gaussian=gaussian,
        bilateral=bilateral,
        features=features,
        normalization=normalization,
        self_term=self_term,
        backend=backend,
        unary_type=unary_type,
        devices=check.DEVICES,
        precision=precision,
    )
    update = mean_field(model)

    def steps() -> Iterator[Tensor]:
        q = None
        done = 0
        while iterations is None or done < iterations:
            q = update(1, q, "probabilities")
            yield _as_unary(q, unary)
            done += 1

    return steps()


def _as_unary(result: Tensor, unary: Tensor) -> Tensor:
    return result.view(unary.shape).to(unary.dtype)
