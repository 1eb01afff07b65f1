from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Decision(_message.Message):
    __slots__ = ("request_id", "time", "model", "target_model", "profile", "endpoints", "candidates", "scorers", "matched_tokens", "prompt_tokens", "ties", "cost_us", "priority", "objective", "rule", "saturation", "plan", "prefill", "encode", "failures")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODEL_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    MATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TIES_FIELD_NUMBER: _ClassVar[int]
    COST_US_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    SATURATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    time: float
    model: str
    target_model: str
    profile: str
    endpoints: _containers.RepeatedScalarFieldContainer[str]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    scorers: _containers.RepeatedCompositeFieldContainer[Scorer]
    matched_tokens: float
    prompt_tokens: float
    ties: int
    cost_us: float
    priority: int
    objective: str
    rule: str
    saturation: Saturation
    plan: str
    prefill: Decision
    encode: Decision
    failures: _containers.RepeatedCompositeFieldContainer[Failure]
    def __init__(self, request_id: _Optional[str] = ..., time: _Optional[float] = ..., model: _Optional[str] = ..., target_model: _Optional[str] = ..., profile: _Optional[str] = ..., endpoints: _Optional[_Iterable[str]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., scorers: _Optional[_Iterable[_Union[Scorer, _Mapping]]] = ..., matched_tokens: _Optional[float] = ..., prompt_tokens: _Optional[float] = ..., ties: _Optional[int] = ..., cost_us: _Optional[float] = ..., priority: _Optional[int] = ..., objective: _Optional[str] = ..., rule: _Optional[str] = ..., saturation: _Optional[_Union[Saturation, _Mapping]] = ..., plan: _Optional[str] = ..., prefill: _Optional[_Union[Decision, _Mapping]] = ..., encode: _Optional[_Union[Decision, _Mapping]] = ..., failures: _Optional[_Iterable[_Union[Failure, _Mapping]]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("plugin", "reason")
    PLUGIN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    plugin: str
    reason: str
    def __init__(self, plugin: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Saturation(_message.Message):
    __slots__ = ("value", "endpoints", "unknown")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    value: float
    endpoints: int
    unknown: int
    def __init__(self, value: _Optional[float] = ..., endpoints: _Optional[int] = ..., unknown: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("address", "name", "page_age", "excluded_by", "unknown", "total")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_AGE_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_BY_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    address: str
    name: str
    page_age: float
    excluded_by: str
    unknown: bool
    total: float
    def __init__(self, address: _Optional[str] = ..., name: _Optional[str] = ..., page_age: _Optional[float] = ..., excluded_by: _Optional[str] = ..., unknown: _Optional[bool] = ..., total: _Optional[float] = ...) -> None: ...

class Scorer(_message.Message):
    __slots__ = ("name", "weight", "scores", "failed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    name: str
    weight: float
    scores: _containers.RepeatedScalarFieldContainer[float]
    failed: str
    def __init__(self, name: _Optional[str] = ..., weight: _Optional[float] = ..., scores: _Optional[_Iterable[float]] = ..., failed: _Optional[str] = ...) -> None: ...
