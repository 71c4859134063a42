{{- /* An image of this server: its name, with the registry and the tag. */ -}}
{{- define "image" -}}
{{- $registry := .root.Values.image.registry -}}
{{- if $registry }}{{ $registry }}/{{ end }}loraretriever-{{ .kind }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- end -}}

{{- /* The pod template with its image, and with the values that are merged into the pod and its container. */ -}}
{{- define "pod" -}}
{{- $spec := mergeOverwrite .template.spec .values.pod -}}
{{- $container := set (first $spec.containers) "image" (include "image" .) -}}
{{- $_ := set $spec "containers" (list (mergeOverwrite $container .values.container)) -}}
{{- set .template "spec" $spec | toYaml -}}
{{- end -}}

{{- /* Seconds after which no request runs any more, and these many more. */ -}}
{{- define "longest-request" -}}
{{ add .plus (.root.Values.settings.max_request_s | default 600 | ceil) }}
{{- end -}}

{{- /* Devices and engines of the workers of all base models, as one text. */ -}}
{{- define "workers" -}}
{{- range prepend (.Values.settings.models | default list) .Values.settings }}{{ with .worker }}{{ .device }} {{ .engine }} {{ end }}{{ end -}}
{{- end -}}

{{- /* The folder of a pool that is kept on a claim; empty for a pool in a bucket. */ -}}
{{- define "pool-folder" -}}
{{- $uri := .Values.settings.store_uri -}}
{{- $folder := trimPrefix "file://" $uri -}}
{{- if hasPrefix "/" $folder -}}
{{ $folder }}
{{- else if not (regexMatch "^(s3|gs)://" $uri) -}}
{{ fail (printf "settings.store_uri: %q must be an absolute path, s3://… or gs://…" $uri) }}
{{- end -}}
{{- end -}}

{{- /* Network policies of a file of kustomize's, with the values that are merged into them. */ -}}
{{- define "policies" -}}
{{- range splitList "\n---\n" (.root.Files.Get (printf "files/%s.yaml" .name)) }}
{{- $policy := fromYaml . }}
---
{{ set $policy "spec" (mergeOverwrite $policy.spec (get $.root.Values.networkPolicies $policy.metadata.name | default dict)) | toYaml }}
{{- end }}
{{- end -}}

{{- /* A file of kustomize's, as it is. */ -}}
{{- define "file" -}}
---
{{ .root.Files.Get (printf "files/%s.yaml" .name) }}
{{- end -}}
