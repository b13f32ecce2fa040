"""Policies: what they see, how they decide, and the files that hold them."""

from lhopt_fused.policy.base import (
    Policy,
    PolicyRun,
    RunDecision,
    RunObservation,
    StartOptions,
    policy_for_run,
)
from lhopt_fused.policy.decision import Decision, DecisionMode, PolicyState, policy_step
from lhopt_fused.policy.features import FEATURES, FEATURES_HASH, FeatureState, Observation
from lhopt_fused.policy.file import PolicyFileError, inspect_policy, load_policy_file, save_policy
from lhopt_fused.policy.learned import LearnedPolicy
from lhopt_fused.policy.library import builtin_policies, load_policy
from lhopt_fused.policy.network import NetworkShape, PolicyNetwork
from lhopt_fused.policy.rules import RulePolicy

__all__ = [
    "FEATURES",
    "FEATURES_HASH",
    "Decision",
    "DecisionMode",
    "FeatureState",
    "LearnedPolicy",
    "NetworkShape",
    "Observation",
    "Policy",
    "PolicyFileError",
    "PolicyNetwork",
    "PolicyRun",
    "PolicyState",
    "RulePolicy",
    "RunDecision",
    "RunObservation",
    "StartOptions",
    "builtin_policies",
    "inspect_policy",
    "load_policy",
    "load_policy_file",
    "policy_for_run",
    "policy_step",
    "save_policy",
]
