"""The GL(r) geometry of LoRA adapters: bundle, connection, transport, gauges, distances.

The pairs (B, A) of full rank r are the total space of a principal GL(r)-bundle over the m x n
matrices of rank r; an adapter's weights are a point of it, and its update X = B A is the point's
image in the base. Everything here is either the same in every gauge or moves with it as it should.
"""

from gauge_ext.geometry.base import BaseVector
from gauge_ext.geometry.carry import lift, move_base, rebase
from gauge_ext.geometry.connection import (
    connection_form,
    horizontal,
    horizontal_lift,
    project,
    vertical,
)
from gauge_ext.geometry.curvature import curvature
from gauge_ext.geometry.distance import (
    bures_wasserstein_distance,
    frobenius_distance,
    principal_angles,
    procrustes_alignment,
    procrustes_distance,
)
from gauge_ext.geometry.equal_energy import quantisation_factor
from gauge_ext.geometry.fingerprint import Fingerprint, fingerprint_points
from gauge_ext.geometry.gauge import GAUGES, Gauged, GaugeName, to_gauge
from gauge_ext.geometry.hidden_space import Fit, HiddenSpace
from gauge_ext.geometry.low_rank import LowRank, RowBlocks, input_factor, nearest_low_rank
from gauge_ext.geometry.metric import metric, quotient_metric, riemannian_gradient
from gauge_ext.geometry.point import FactoredLayer, LoRAPoint, LoRATangent
from gauge_ext.geometry.retraction import retract, vector_transport
from gauge_ext.geometry.transport import holonomy, is_admissible, link, overlap, transport

__all__ = [
    "GAUGES",
    "BaseVector",
    "FactoredLayer",
    "Fingerprint",
    "Fit",
    "GaugeName",
    "Gauged",
    "HiddenSpace",
    "LoRAPoint",
    "LoRATangent",
    "LowRank",
    "RowBlocks",
    "bures_wasserstein_distance",
    "connection_form",
    "curvature",
    "fingerprint_points",
    "frobenius_distance",
    "holonomy",
    "horizontal",
    "horizontal_lift",
    "input_factor",
    "is_admissible",
    "lift",
    "link",
    "metric",
    "move_base",
    "nearest_low_rank",
    "overlap",
    "principal_angles",
    "procrustes_alignment",
    "procrustes_distance",
    "project",
    "quantisation_factor",
    "quotient_metric",
    "rebase",
    "retract",
    "riemannian_gradient",
    "to_gauge",
    "transport",
    "vector_transport",
    "vertical",
]
