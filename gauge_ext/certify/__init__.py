"""Certificates of convergence: what can be proven, and an honest "no" where nothing can.

:func:`certify_basin` is about quadratic objectives and where ScaledGD may start; :func:`local_rate`
about any smooth loss, at a stationary point. Neither says anything about training a network from
its start.
"""

from gauge_ext.certify.basin import BasinCertificate, certify_basin
from gauge_ext.certify.local_rate import LocalRate, local_rate

__all__ = ["BasinCertificate", "LocalRate", "certify_basin", "local_rate"]
