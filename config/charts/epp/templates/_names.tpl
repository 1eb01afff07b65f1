{{/* Names, as the Gateway API Inference Extension's charts have them, so that a release can be upgraded in place. */}}
{{- define "epp.name" -}}
{{ .Release.Name | lower | trunc 40 | trimSuffix "-" }}-epp
{{- end }}

{{/* For what lives in no namespace. */}}
{{- define "epp.cluster-name" -}}
{{ printf "%s-%s" .Release.Namespace (include "epp.name" .) | trunc 47 | trimSuffix "-" }}-{{ printf "%s/%s" .Release.Namespace .Release.Name | sha256sum | trunc 10 }}
{{- end }}

{{- define "epp.labels" -}}
app.kubernetes.io/name: {{ include "epp.name" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "epp.selector" -}}
{{ if include "epp.pool" . }}inferencepool{{ else }}epp{{ end }}: {{ include "epp.name" . }}
{{- end }}

{{/* Facts that more than one file asks for: "true" or nothing. */}}
{{- define "epp.standalone" -}}
{{ if eq .Values.mode "standalone" }}true{{ end }}
{{- end }}

{{- define "epp.pool" -}}
{{ if or (not (include "epp.standalone" .)) .Values.inferenceExtension.endpointsServer.createInferencePool }}true{{ end }}
{{- end }}

{{- define "epp.elects" -}}
{{ $flags := .Values.inferenceExtension.flags -}}
{{ $elects := gt (int .Values.inferenceExtension.replicas) 1 -}}
{{ if hasKey $flags "ha-enable-leader-election" }}{{ $elects = eq (toString (get $flags "ha-enable-leader-election")) "true" }}{{ end -}}
{{ if $elects }}true{{ end }}
{{- end }}

{{- define "epp.secure" -}}
{{ if ne (toString (get .Values.inferenceExtension.flags "secure-serving")) "false" }}true{{ end }}
{{- end }}

{{- define "epp.reviews" -}}
{{ $flags := .Values.inferenceExtension.flags -}}
{{ $auth := .Values.inferenceExtension.monitoring.prometheus.auth.enabled -}}
{{ if hasKey $flags "metrics-endpoint-auth" }}{{ $auth = eq (toString (get $flags "metrics-endpoint-auth")) "true" }}{{ end -}}
{{ if $auth }}true{{ end }}
{{- end }}

{{/* What the picker calls its pool; without one that is its Deployment. */}}
{{- define "epp.scope" -}}
{{ if include "epp.pool" . }}{{ .Release.Name }}{{ else }}{{ include "epp.name" . }}{{ end }}
{{- end }}

{{- define "epp.group" -}}
{{ splitList "/" .Values.inferencePool.apiVersion | first }}
{{- end }}

{{/* Ports that the container listens on. */}}
{{- define "epp.grpc-port" -}}{{ get .Values.inferenceExtension.flags "grpc-port" | default 9002 }}{{- end }}
{{- define "epp.health-port" -}}{{ get .Values.inferenceExtension.flags "grpc-health-port" | default 9003 }}{{- end }}
{{- define "epp.metrics-port" -}}{{ get .Values.inferenceExtension.flags "metrics-port" | default 9090 }}{{- end }}

{{- define "epp.image" -}}
{{ $image := .Values.inferenceExtension.image -}}
{{ with $image.hub | default $image.registry }}{{ . }}/{{ end }}{{ $image.name | default $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* What must hold between values, which a schema cannot say. */}}
{{- define "epp.check" -}}
{{ $server := .Values.inferenceExtension.endpointsServer -}}
{{ if and (include "epp.pool" .) (not .Values.inferencePool.modelServers.matchLabels) -}}
{{ fail "inferencePool.modelServers.matchLabels is required: the labels of the model servers' pods, for instance --set inferencePool.modelServers.matchLabels.app=vllm" }}
{{- end -}}
{{ if and (not (include "epp.pool" .)) (not $server.endpointSelector) -}}
{{ fail "inferenceExtension.endpointsServer.endpointSelector is required without a pool: the labels of the model servers' pods, for instance app=vllm" }}
{{- end -}}
{{ if and .Values.inferenceObjectives (not (include "epp.pool" .)) -}}
{{ fail "inferenceObjectives name a pool: set inferenceExtension.endpointsServer.createInferencePool=true" }}
{{- end -}}
{{ if and (eq (include "epp.group" .) "inference.networking.x-k8s.io") (ne (len .Values.inferencePool.targetPorts) 1) -}}
{{ fail "inferencePool.targetPorts: a pool of inference.networking.x-k8s.io/v1alpha2 has one port" }}
{{- end -}}
{{ $file := .Values.inferenceExtension.pluginsConfigFile -}}
{{ if and (ne $file "default-plugins.yaml") (not (hasKey .Values.inferenceExtension.pluginsCustomConfig $file)) -}}
{{ fail (printf "inferenceExtension.pluginsConfigFile: there is no %s; give its text in inferenceExtension.pluginsCustomConfig" $file) }}
{{- end -}}
{{ if and .Values.inferenceExtension.podDisruptionBudget.enabled (include "epp.elects" .) -}}
{{ fail "inferenceExtension.podDisruptionBudget: a standby is never ready, so a budget would keep the leader's node from ever being drained; an evicted leader hands over by itself, so leave it out" }}
{{- end -}}
{{- end }}
