{{- /* An image of this server: its name, with the registry and the tag. */ -}}
{{- define "image" -}}
{{- $registry := .root.Values.image.registry -}}
{{- if $registry }}{{ $registry }}/{{ end }}loraretriever-{{ .kind }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- end -}}

{{- /* The pod template with its image, and with the values that are merged into the pod and its container. */ -}}
{{- define "pod" -}}
{{- $spec := mergeOverwrite .template.spec .values.pod -}}
{{- $container := mergeOverwrite (first $spec.containers) .values.container -}}
{{- $_ := set $container "image" (include "image" .) -}}
{{- $_ := set $spec "containers" (list $container) -}}
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

{{- /* A file of kustomize's, as it is. */ -}}
{{- define "file" -}}
---
{{ .root.Files.Get (printf "files/%s.yaml" .name) }}
{{- end -}}
