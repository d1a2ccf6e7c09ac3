"""Guardrails: what a prompt or an answer may not hold, found and acted upon. Pure; text in, text and verdicts out."""

from policies.guardrails.inspect import InputInspection, Outcome, OutputInspector, Verdict, inspect_input, merged

__all__ = ["InputInspection", "Outcome", "OutputInspector", "Verdict", "inspect_input", "merged"]
