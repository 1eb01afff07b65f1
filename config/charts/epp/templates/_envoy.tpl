{{/* Envoy beside the picker. The same as config/envoy/standalone-eds.yaml, which says why each line is as it is, but for
the listener `stats`, the cluster `admin`, how long the first endpoints are waited for, names and ports: a test keeps the
two together. */}}
{{- define "epp.envoy" }}
node: {id: {{ include "epp.name" . }}, cluster: {{ include "epp.name" . }}}

admin:
  address: {socket_address: {address: 127.0.0.1, port_value: 19000}}

static_resources:
  listeners:
  - name: gateway
    address: {socket_address: {address: {{ include "epp.any-address" . }}, port_value: {{ .Values.inferenceExtension.sidecar.port }}}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: gateway
          stream_idle_timeout: 600s
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: /}
                request_body_buffer_limit: 16777216
                route:
                  cluster: pool
                  timeout: 0s
                  retry_policy:
                    retry_on: connect-failure,refused-stream,reset,retriable-status-codes
                    retriable_status_codes: [503]
                    num_retries: 3
                    per_try_idle_timeout: 300s
                    retry_host_predicate:
                    - name: previous-hosts
                      typed_config: {"@type": type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}
                    host_selection_retry_max_attempts: 5
          upgrade_configs: [{upgrade_type: websocket}]
          http_filters:
          - name: picker
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {envoy_grpc: {cluster_name: picker}}
              processing_mode:
                request_header_mode: SEND
                request_body_mode: FULL_DUPLEX_STREAMED
                request_trailer_mode: SEND
                response_header_mode: SEND
                response_body_mode: NONE
                response_trailer_mode: SEND
              failure_mode_allow: false
              message_timeout: 5s
              metadata_options:
                forwarding_namespaces: {untyped: [envoy.lb, envoy.lb.subset_hint]}
                receiving_namespaces: {untyped: [envoy.lb]}
          - name: router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}

  # For kubelet and Prometheus: /ready and /stats/prometheus of the admin page, which is on loopback.
  - name: stats
    address: {socket_address: {address: {{ include "epp.any-address" . }}, port_value: 19001}}
    filter_chains:
    - filters:
      - name: http
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: stats
          route_config:
            virtual_hosts:
            - name: admin
              domains: ["*"]
              routes:
              - match: {path: /ready}
                route: {cluster: admin}
              - match: {path: /stats/prometheus}
                route: {cluster: admin}
          http_filters:
          - name: router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}

  clusters:
  - name: admin
    type: STATIC
    connect_timeout: 2s
    load_assignment:
      cluster_name: admin
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 19000}}}}]}]

  - name: pool
    type: EDS
    connect_timeout: 2s
    eds_cluster_config:
      eds_config:
        resource_api_version: V3
        # The listener opens, and the pod is ready, once the picker has told its endpoints: not before there are any.
        initial_fetch_timeout: 0s
        api_config_source:
          api_type: GRPC
          transport_api_version: V3
          # Envoy starts first, and the picker may start anew: looked for at least every second instead of every 30.
          grpc_services: [{envoy_grpc: {cluster_name: picker-eds, retry_policy: {retry_back_off: {base_interval: 0.1s, max_interval: 1s}}}}]
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.override_host
          typed_config:
            "@type": type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost
            override_host_sources:
            - metadata: {key: envoy.lb, path: [{key: x-gateway-destination-endpoint}]}
            selected_host_key: {key: envoy.lb, path: [{key: x-gateway-destination-endpoint-served}]}
            fallback_policy:
              policies:
              - typed_extension_config:
                  name: envoy.load_balancing_policies.round_robin
                  typed_config: {"@type": type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin}
    circuit_breakers: &plenty
      thresholds: [{max_connections: 100000, max_pending_requests: 100000, max_requests: 100000, max_retries: 100000}]

  # The picker's health port, --grpc-health-port, which is plaintext.
  - name: picker-eds
    type: STATIC
    connect_timeout: 2s
    load_assignment:
      cluster_name: picker-eds
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{ include "epp.health-port" . }}}}}}]}]
    typed_extension_protocol_options: &http2
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {connection_keepalive: {interval: 10s, timeout: 5s}}}

  - name: picker
    type: STATIC
    connect_timeout: 2s
    load_assignment:
      cluster_name: picker
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: {{ include "epp.grpc-port" . }}}}}}]}]
    circuit_breakers: *plenty
{{- if include "epp.secure" . }}
    # The picker's own certificate is self-signed, and nobody is between.
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context: {alpn_protocols: [h2]}
{{- end }}
    typed_extension_protocol_options: *http2
{{- end }}

{{/* A side-car in Kubernetes' own sense (an init container that stays): it ends after the picker, which ends when the last
request is answered. */}}
{{- define "epp.envoy-container" -}}
- name: envoy
  restartPolicy: Always
  image: {{ .Values.inferenceExtension.sidecar.image | quote }}
  imagePullPolicy: IfNotPresent
  # --concurrency: two workers keep one picker busy. Hot restart wants shared memory, and nobody restarts it hot.
  args: [-c, /etc/envoy/envoy.yaml, --disable-hot-restart, --log-level, warning, --concurrency, "2"]
  ports:
    - name: http
      containerPort: {{ .Values.inferenceExtension.sidecar.port }}
    - name: envoy-stats
      containerPort: 19001
  readinessProbe:
    httpGet:
      path: /ready
      port: envoy-stats
    periodSeconds: 2
  resources: {{- toYaml .Values.inferenceExtension.sidecar.resources | nindent 4 }}
  securityContext: {{- include "epp.confined" . | nindent 4 }}
  volumeMounts:
    - name: envoy
      mountPath: /etc/envoy
      readOnly: true
{{- end }}

{{/* "::" takes IPv4 too where there is any. */}}
{{- define "epp.any-address" -}}
{{ $address := .Values.inferenceExtension.sidecar.address -}}
{{ $address | quote }}{{ if contains ":" $address }}, ipv4_compat: true{{ end }}
{{- end }}
