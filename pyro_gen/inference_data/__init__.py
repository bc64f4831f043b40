r"""To ArviZ: from what inference gave to groups of named arrays.

A Pyro trace already says what ArviZ asks for. A plate is a dim; a site is a latent, data, a factor or a deterministic;
the log-probability of an observed site, one number an element of its plates, is the pointwise likelihood. So plates
become dims under their own names, and whatever the source, draws stand along ``(chain, draw)``, a chain being one
independent run: an MCMC chain, or a restart of variational inference.

================== =============================================================================================
group              holds
================== =============================================================================================
posterior          latents (constrained) and deterministics; of a fitted program its scalar parameters, one draw;
                   of a sampler's run its draws of x, which are data (attribute ``draws_of``)
latent             of a fitted program: draws of the latents of each row; ``latent_stats`` their moments, the ELBO
sample_stats       ``lp`` (log joint), ``log_q``, ``log_weight``; of MCMC ``diverging``; of a sampler's run ``lp`` (log
                   f), ``acceptance_rate``, ``diverging``, ``step_size``, ``ess`` of each chain
log_likelihood     of each observed entry at each draw, event dims summed; attribute ``likelihood_kind``
log_evidence       log p(x) of each row at a point estimate; attribute ``kind``: exact, estimate or a bound
noise_levels       of a diffusion: terms of its bound by the time and log SNR of each step, means over rows
log_prior          of each latent
fit                of a guide ELBO and k̂, of a fit its history
================== =============================================================================================

``az.loo`` needs draws from a posterior. Where there is one draw, or only log p(x | z) given latents that each row has
for itself, there is no group ``log_likelihood``, and ``az.loo`` raises an error that says so.
"""

from pyro_gen.inference_data.sources import to_inference_data

__all__ = ["to_inference_data"]
