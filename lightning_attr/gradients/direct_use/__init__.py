r"""Parameters that code uses directly, outside the layers that have a gradient rule, in the pass of the hooks.

A position embedding is added, a weight is multiplied, a table is indexed: no layer of its own holds the parameter, so
no hook sees it used. The idea: **wherever a parameter meets the batch, give every sample a copy of its own**. Take

    ``output = x @ w + c.exp()``    with ``x`` of the batch, ``(b, m)``; parameters ``w``, ``(m, k)``, ``c``, ``(k,)``

A mode (:class:`~lightning_attr.gradients.direct_use.tracer.DirectUses`) sees each function of torch that is called, and
keeps the set of *free* tensors: those that do not depend on the batch, such as parameters, buffers, and what is
computed from them alone.

1. ``x @ w`` mixes a tensor of the batch with one that derives from ``w``. The handler of ``matmul`` knows that this is
   a linear layer: :math:`G_i = \sum_s x_{is} \delta_{is}^\top` from the input and the gradient at the output.
2. ``c.exp()`` has free operands only: its result is free, and *derived* from ``c``. Nothing is done yet.
3. ``... + c.exp()`` is where it meets the batch. The handler of elementwise functions puts an expanded copy,
   ``(b, k)``, in its place, as a new leaf. Its gradient has one row per sample, :math:`r_i`, which is pulled back to
   ``c``: :math:`g_i = J^\top r_i` with the Jacobian :math:`J` of ``exp``, for all rows at once.

What a call means follows from how its operands are aligned, not from sizes that happen to agree: the batch is the first
dimension of what depends on it. A handler that cannot be sure returns ``NotImplemented``; the parameter is then
reported and left to a slower path. Nothing is guessed.

``free_values`` knows which tensors are free and what they derive from, ``copied_values`` gives each sample its copy and
passes gradients on, ``tracer`` is the mode, ``use`` one call as handlers see it, and their register. Handlers live in a
file per family:
``elementwise``, ``repetition``, ``products``, ``indexing``, ``attention_mask``, and ``layers`` for the functional forms
of layers. A new handler is a function under :func:`~lightning_attr.gradients.direct_use.use.handles`.
"""

from lightning_attr.gradients.direct_use import (  # noqa: F401  # they register their handlers
    attention_mask,
    elementwise,
    indexing,
    layers,
    products,
    repetition,
)
